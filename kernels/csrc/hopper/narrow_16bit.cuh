// 16-bit cache for the kernel of few query rows: slabs of 32 tokens x 64 elements in the copy engine's 128-byte swizzle,
// read as fragments by ldmatrix, as they are for the scores and transposed for the values.
#ifndef MLA_HOPPER_NARROW_16BIT_CUH_
#define MLA_HOPPER_NARROW_16BIT_CUH_

#include "epilogue.cuh"
#include "mma.cuh"
#include "narrow_layout.cuh"

namespace mla_hopper {

// One warp's operands: 128 latents and a quarter of the rope, as in NarrowFp8.
template <typename Element>
struct Narrow16bit {
  using T = Element;
  static constexpr int kStepTokens = 32;
  static constexpr int kStepSlabBytes = kStepTokens * kColumns * 2;
  static constexpr int kStepBytes = kSlabs * kStepSlabBytes;
  using L = NarrowLayout<kStepBytes>;
  static constexpr float kUnit = 1.f;

  // Copies a step's tokens, a lane for each slab.
  static __device__ __forceinline__ void load(const Params&, const CUtensorMap* map, uint32_t slabs, uint32_t barrier, int page,
                                              int step, uint64_t policy, int lane) {
    if (lane == 0) mbarrier_expect(barrier, kStepBytes);
    __syncwarp();
    if (lane < kSlabs) {
      tensor_copy(slabs + lane * kStepSlabBytes, map, barrier, lane * kColumns, step * kStepTokens, page, policy);
    }
  }

  // Fragments of the query rows: 8 steps of 16 latents, then 16 values of the rope.
  struct Query {
    uint32_t value[9][4];

    __device__ __forceinline__ void load(const char* query, int block, int lane) {
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const int row = lane & 15;
        const uint32_t address = shared_address(query) + slab(k, block) * L::kQuerySlabBytes + row * 128;
        load_fragment(value[k], address + (((first_unit(k, block) + lane / 16) ^ (row & 7)) << 4));
      }
    }
  };

  // This warp's share of the scores: s[j] has tokens 8 j + 2 c and the next for rows g and g + 8.
  __device__ __forceinline__ void scores(float (&s)[kStepTokens / 8][4], const Query& query, uint32_t slabs, int block, int lane,
                                         int) const {
    // Lane i gives row i % 8 of matrix i / 8: tokens + 8 for matrices 2 and 3, k + 8 for 1 and 3.
    const int token = (lane & 7) + lane / 16 * 8;
    const uint32_t address = slabs + token * 128;
    const int swizzle = lane & 7;
    const int unit = lane / 8 & 1;
#pragma unroll
    for (int e = 0; e < 4 * (kStepTokens / 8); ++e) s[e / 4][e % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      const uint32_t keys = address + slab(k, block) * kStepSlabBytes + (((first_unit(k, block) + unit) ^ swizzle) << 4);
#pragma unroll
      for (int j = 0; j < kStepTokens / 8; j += 2) {
        uint32_t b[4];
        load_fragment(b, keys + j * 1024);
        mma(s[j], query.value[k], b[0], b[1], T());
        mma(s[j + 1], query.value[k], b[2], b[3], T());
      }
    }
  }

  __device__ __forceinline__ uint32_t weights(float x, float y, int) const { return pack(x, y, T()); }

  // o += weights x values: o[q][i] has latents 64 (q ^ half) + 8 i + 2 c and the next, rows g and g + 8.
  __device__ __forceinline__ void values(float (&o)[2][8][4], const uint32_t (&weight)[kStepTokens / 16][4], uint32_t slabs,
                                         int block, int half, int lane, int used) const {
    if (used < kStepTokens) clear(slabs, block, lane, used);
    // Lane i gives row i % 8 of matrix i / 8: tokens + 8 for matrices 1 and 3, latents + 8 for 2 and 3.
    const int token = (lane & 7) + (lane / 8 & 1) * 8;
    const uint32_t address = slabs + token * 128;
    const uint32_t halves[2] = {address + (2 * block + half) * kStepSlabBytes, address + (2 * block + 1 - half) * kStepSlabBytes};
    const int unit = lane / 16;
#pragma unroll
    for (int k = 0; k < kStepTokens / 16; ++k) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          uint32_t b[4];
          load_transposed(b, halves[q] + k * 2048 + (((i + unit) ^ (lane & 7)) << 4));
          mma(o[q][i], weight[k], b[0], b[1], T());
          mma(o[q][i + 1], weight[k], b[2], b[3], T());
        }
      }
    }
  }

  // Finished chunks of 8 latents, 2 pair and the next (part_pack.cuh), to the caller's output.
  static __device__ __forceinline__ void store_chunks(const RowPair<T>& rows, int pair, int lane, const float4& first,
                                                      const float4& second) {
    rows.store(16 * pair, lane, first, second);
  }

  // Finished latents 8 unit + 2 c and the next, rows g and g + 8, to the caller's output.
  static __device__ __forceinline__ void store_unit(const RowPair<T>& rows, int unit, int lane, const float4& value) {
    const int column = 8 * unit + 2 * (lane & 3);
    if (rows.row[0] != nullptr) *reinterpret_cast<uint32_t*>(rows.row[0] + column) = pack(value.x, value.y, T());
    if (rows.row[1] != nullptr) *reinterpret_cast<uint32_t*>(rows.row[1] + column) = pack(value.z, value.w, T());
  }

  // 64 finished latents from `column` on to the caller's output, rows times scale[0] and scale[1].
  static __device__ __forceinline__ void store(const RowPair<T>& rows, int column, int lane, const float (&o)[8][4],
                                               const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float4 value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        value[e] = make_float4(o[i + e][0] * scale[0], o[i + e][1] * scale[0], o[i + e][2] * scale[1], o[i + e][3] * scale[1]);
      }
      rows.store(column + 8 * i, lane, value[0], value[1]);
    }
  }

 private:
  // Where the k-th 16 of the warp's elements lie.
  static __device__ __forceinline__ int slab(int k, int block) { return k < 8 ? 2 * block + k / 4 : 8; }
  static __device__ __forceinline__ int first_unit(int k, int block) { return k < 8 ? 2 * (k & 3) : 2 * block; }

  // This warp's values of tokens past the last: a softmax weight of 0 would not hide a NaN.
  static __device__ __forceinline__ void clear(uint32_t slabs, int block, int lane, int used) {
    const int vectors = (kStepTokens - used) * 8;
#pragma unroll 1
    for (int i = lane; i < 2 * vectors; i += 32) {
      const int q = i >= vectors;
      const uint32_t address = slabs + (2 * block + q) * kStepSlabBytes + used * 128 + (i - q * vectors) * 16;
      store_zeros(address);
    }
    fence_async_proxy();
    __syncwarp();
  }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_16BIT_CUH_
