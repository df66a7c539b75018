// The producer side for the fp8_ds_mla cache: raw tokens by bulk copies into a ring, then e4m3 and scales to bfloat16 in
// the very layout that the copy engine gives a 16-bit cache, so that the consumers are the same. One warpgroup.
#ifndef MLA_HOPPER_UNPACK_CUH_
#define MLA_HOPPER_UNPACK_CUH_

#include <cuda_bf16.h>

#include "barriers.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// Issues the copies of a group's whole stream of raw tokens, kRawTokens at a time; one warp.
class RawFeeder {
 public:
  __device__ __forceinline__ RawFeeder(const Params& params, const Schedule& schedule, int lane)
      : params_(params), schedule_(schedule), policy_(schedule.cache_policy()), lane_(lane) {
    open_item();
  }

  template <typename L>
  __device__ __forceinline__ void issue(const Barriers<L>& barriers, uint32_t base) {
    if (!valid_) return;
    const int page = __shfl_sync(kAllLanes, pages_, (tile_ - work_.first) & 31);
    if (lane_ == 0) {
      const uint32_t full = barriers.raw_full(slot_);
      mbarrier_expect(full, kRawBytes);
      bulk_copy(base + L::kRaw + slot_ * kRawBytes, params_.raw_cache + page * params_.raw_stride + quarter_ * kRawBytes,
                kRawBytes, full, policy_);
    }
    __syncwarp();
    slot_ = slot_ + 1 == L::kRawSlots ? 0 : slot_ + 1;
    if (++quarter_ == kTileTokens / kRawTokens) {
      quarter_ = 0;
      if (++tile_ == work_.last) {
        open_item();
      } else if (((tile_ - work_.first) & 31) == 0) {
        load_pages();
      }
    }
  }

 private:
  __device__ __forceinline__ void open_item() {
    valid_ = schedule_.next(work_);
    tile_ = work_.first;
    if (valid_) load_pages();
  }
  __device__ __forceinline__ void load_pages() {
    const int32_t* pages = params_.block_table + work_.item * params_.block_table_stride;
    pages_ = tile_ + lane_ < work_.last ? pages[tile_ + lane_] : 0;
  }

  const Params& params_;
  Schedule schedule_;
  uint64_t policy_;
  Work work_ = {};
  int lane_, tile_ = 0, quarter_ = 0, slot_ = 0, pages_ = 0;
  bool valid_ = false;
};

// Two e4m3 codes, in bits 8..15 and 24..31, as bfloat16 times 2^-120: the exponent field moves unchanged, so that
// subnormals are right too. A NaN code (0x7F) reads as 480.
__device__ __forceinline__ __nv_bfloat162 shifted_pair(uint32_t codes) {
  const uint32_t bits = (codes & 0x80008000u) | ((codes >> 4) & 0x07F007F0u);
  return reinterpret_cast<const __nv_bfloat162&>(bits);
}

// Codes times a scale, which is held as the sum of two bfloat16 (16 bits of it) so that only the result is rounded: the
// product with a 4-bit mantissa is exact in the fused multiply-add. A scale of 256 or more becomes infinite.
struct Scale {
  __nv_bfloat162 high, low;
  __device__ __forceinline__ explicit Scale(float scale) {
    const float scaled = scale * 0x1p120f;
    high = __float2bfloat162_rn(scaled);
    low = __float2bfloat162_rn(scaled - __bfloat162float(high.x));
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t codes) const {
    const __nv_bfloat162 value = shifted_pair(codes);
    const __nv_bfloat162 product = __hfma2(value, high, __hmul2(value, low));
    return reinterpret_cast<const uint32_t&>(product);
  }
};

// Vector `vector` of 8 bfloat16 of a token's 576, at its place in a stage.
__device__ __forceinline__ void store_vector(char* stage, int token, int vector, const uint4& value) {
  *reinterpret_cast<uint4*>(stage + vector / 8 * kSlabBytes + token * 128 + (((vector & 7) ^ (token & 7)) << 4)) = value;
}

template <typename L>
__device__ __forceinline__ void unpack_cache(const Params& params, Schedule& schedule, const Barriers<L>& barriers,
                                             char* smem, uint32_t base, int thread) {
  constexpr int kQuarters = kTileTokens / kRawTokens;
  constexpr int kTokens = kRawTokens / (L::kUnpackers / 32);  // of a warp
  const int lane = thread & 31;
  const int warp = thread / 32;
  RawFeeder feeder(params, schedule, lane);
  if (warp == 0) {
#pragma unroll 1
    for (int slot = 0; slot < L::kRawSlots; ++slot) feeder.issue(barriers, base);
  }
  Work work;
  uint32_t tile = 0;
  uint32_t slot = 0, parity = 0;
  while (schedule.next(work)) {
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      const uint32_t stage = tile % L::kStages;
      char* destination = smem + L::kCache + stage * kTileBytes;
#pragma unroll 1
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        // A warp takes kTokens of the 16 tokens, a lane 16 codes of each; the first threads take 8 rope values besides.
        const uint8_t* raw = reinterpret_cast<const uint8_t*>(smem) + L::kRaw + slot * kRawBytes;
        mbarrier_wait(barriers.raw_full(slot), parity);
        uint4 codes[kTokens];
        float scales[kTokens];
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          const uint8_t* token = raw + (warp * kTokens + i) * kTokenBytesFp8;
          codes[i] = *reinterpret_cast<const uint4*>(token + lane * 16);
          scales[i] = *reinterpret_cast<const float*>(token + kLatent + lane / 8 * 4);
        }
        uint4 rope;
        if (thread < kRawTokens * 8) {
          rope = *reinterpret_cast<const uint4*>(raw + thread / 8 * kTokenBytesFp8 + kLatent + 16 + (thread & 7) * 16);
        }
        named_sync(kRawRead, L::kUnpackers);
        if (warp == 0) feeder.issue(barriers, base);
        if (++slot == L::kRawSlots) {
          slot = 0;
          parity ^= 1;
        }
        if (quarter == 0) {
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            mbarrier_wait(barriers.empty(stage, piece), (tile / L::kStages & 1) ^ 1);
          }
        }
        if (thread < kRawTokens * 8) {
          store_vector(destination, quarter * kRawTokens + thread / 8, kLatent / 8 + (thread & 7), rope);
        }
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          const Scale scale(scales[i]);
          const uint32_t word[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
          uint32_t value[8];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            value[2 * j] = scale(__byte_perm(word[j], 0, 0x1404));
            value[2 * j + 1] = scale(__byte_perm(word[j], 0, 0x3424));
          }
          const uint4 first = make_uint4(value[0], value[1], value[2], value[3]);
          const uint4 second = make_uint4(value[4], value[5], value[6], value[7]);
          // Lanes of neighbouring slabs store their two vectors in opposite order, or they would meet in the banks.
          const int token = quarter * kRawTokens + warp * kTokens + i;
          const bool swap = lane & 4;
          store_vector(destination, token, 2 * lane + swap, swap ? second : first);
          store_vector(destination, token, 2 * lane + !swap, swap ? first : second);
        }
      }
      fence_async_proxy();
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) mbarrier_arrive(barriers.full(stage, piece));
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_UNPACK_CUH_
