// fp8_ds_mla cache for the kernel of few query rows: raw tokens in shared memory as they lie in the cache; every warp
// turns its codes into fragments of mma instructions, with the latents as inner dimension for the scores and with the
// tokens as such for the values. Scales are multiplied into scores and weights, so that nothing is rounded on the way.
#ifndef MLA_HOPPER_NARROW_FP8_CUH_
#define MLA_HOPPER_NARROW_FP8_CUH_

#include "codes.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "narrow_layout.cuh"

namespace mla_hopper {

// Codes times 2^-120 times weights times kWeightScale, or query times kQueryScale: both stay in float32's normal range.
constexpr float kWeightScale = 0x1p100f;
constexpr float kQueryScale = 0x1p20f;

// One warp's operands: 128 latents, which are one scale block, and a quarter of the rope. g and c are lane / 4 and lane % 4.
struct NarrowFp8 {
  using T = __nv_bfloat16;
  static constexpr int kStepTokens = kTileTokens;
  static constexpr int kStepBytes = kStepTokens * kTokenBytesFp8;
  using L = NarrowLayout<kStepBytes>;
  static constexpr float kUnit = 1.f / (0x1p-120f * kWeightScale);  // what the values' sum is too small by

  // Copies a page's tokens, which are contiguous.
  static __device__ __forceinline__ void load(const Params& params, const CUtensorMap*, uint32_t raw, uint32_t barrier, int page,
                                              int, uint64_t policy, int lane) {
    if (lane == 0) {
      mbarrier_expect(barrier, kStepBytes);
      bulk_copy(raw, params.raw_cache + page * params.raw_stride, kStepBytes, barrier, policy);
    }
  }

  // The query rows of one warp's latents and its quarter of the rope, as A fragments. Their k runs as scores() takes it:
  // fragment 4 l + s has latents 32 c + 16 l + 4 s to + 3 of the block, fragment 8 rope values 16 block + 4 c to + 3.
  struct Query {
    uint32_t value[9][4];

    __device__ __forceinline__ void load(const char* slabs, int block, int lane) {
      const int g = lane / 4, c = lane & 3;
      const __nv_bfloat162 factor = __float2bfloat162_rn(kQueryScale);
#pragma unroll
      for (int l = 0; l < 2; ++l) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            // A 16-byte vector: k 0 to 7 of 16, for steps 2 h and 2 h + 1.
            const char* row = slabs + (2 * block + c / 2) * L::kQuerySlabBytes + (g + 8 * i) * 128;
            const uint4 v = *reinterpret_cast<const uint4*>(row + (((4 * (c & 1) + 2 * l + h) ^ g) << 4));
            const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(word[e]), factor);
              value[4 * l + 2 * h + e / 2][i + 2 * (e & 1)] = reinterpret_cast<const uint32_t&>(scaled);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char* row = slabs + 8 * L::kQuerySlabBytes + (g + 8 * i) * 128;
        const uint2 v = *reinterpret_cast<const uint2*>(row + (((2 * block + c / 2) ^ g) << 4) + 8 * (c & 1));
        value[8][i] = v.x;
        value[8][i + 2] = v.y;
      }
    }
  };

  float scale[kStepTokens / 8][2];

  // This warp's share of the scores of a step: its block's latents times the scales, and its quarter of the rope. s[j] has
  // tokens 8 j + 2 c and the next for rows g and g + 8; scale[j] has these tokens' scales times kWeightScale, 0 for tokens
  // from `used` on, whose memory may hold anything.
  __device__ __forceinline__ void scores(float (&s)[kStepTokens / 8][4], const Query& query, uint32_t raw, int block, int lane,
                                         int used) {
    const int g = lane / 4, c = lane & 3;
    const uint32_t token = raw + g * kTokenBytesFp8;  // and every eighth after it
    const uint32_t codes = token + block * 128 + c * 32;
    const uint32_t scales = raw + 2 * c * kTokenBytesFp8 + kLatent + 4 * block;
#pragma unroll
    for (int j = 0; j < kStepTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        scale[j][e] = load_shared<float>(scales + (8 * j + e) * kTokenBytesFp8) * kWeightScale;
        s[j][e] = s[j][2 + e] = 0.f;
      }
    }
#pragma unroll
    for (int l = 0; l < 2; ++l) {
#pragma unroll
      for (int j = 0; j < kStepTokens / 8; ++j) {
        uint32_t word[4];
        load_shared(word, codes + 8 * j * kTokenBytesFp8 + 16 * l);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          mma(s[j], query.value[4 * l + k], shifted_codes(byte_pair<0, 1>(word[k], word[k])),
              shifted_codes(byte_pair<2, 3>(word[k], word[k])), T());
        }
      }
    }
    if (used < kStepTokens) {
#pragma unroll
      for (int j = 0; j < kStepTokens / 8; ++j) {
        if (8 * j + 2 * c >= used) scale[j][0] = 0.f;
        if (8 * j + 2 * c + 1 >= used) scale[j][1] = 0.f;
      }
    }
#pragma unroll
    for (int j = 0; j < kStepTokens / 8; ++j) {
      uint32_t rope[2];
      load_shared(rope, token + 8 * j * kTokenBytesFp8 + kLatent + 16 + block * 32 + c * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] *= scale[j][e & 1];
      mma(s[j], query.value[8], rope[0], rope[1], T());
    }
  }

  // Weights of two neighbouring tokens of group j as they are multiplied with the codes.
  __device__ __forceinline__ uint32_t weights(float x, float y, int j) const {
    return pack(x * scale[j][0], y * scale[j][1], T());
  }

  // o += weights x values: o[q][i] has latents 64 (q ^ half) + 16 c + i and that plus 8, rows g and g + 8.
  __device__ __forceinline__ void values(float (&o)[2][8][4], const uint32_t (&weight)[kStepTokens / 16][4], uint32_t raw,
                                         int block, int half, int lane, int) const {
    const uint32_t codes = raw + 2 * (lane & 3) * kTokenBytesFp8 + block * 128 + 64 * half + lane / 4 * 8;
    const uint32_t halves[2] = {codes, codes + 64 - 128 * half};
#pragma unroll
    for (int k = 0; k < kStepTokens / 16; ++k) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        uint32_t v[4][2];  // 8 latents of tokens 2 c, 2 c + 1, 2 c + 8, 2 c + 9
#pragma unroll
        for (int e = 0; e < 4; ++e) load_shared(v[e], halves[q] + (16 * k + (e & 1) + 8 * (e / 2)) * kTokenBytesFp8);
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          add_latent<0>(o[q][4 * word], weight[k], v, word);
          add_latent<1>(o[q][4 * word + 1], weight[k], v, word);
          add_latent<2>(o[q][4 * word + 2], weight[k], v, word);
          add_latent<3>(o[q][4 * word + 3], weight[k], v, word);
        }
      }
    }
  }

  // Finished latents 2 (pair % 4) and the next of a lane's 16 of a block of 64, and the eighths after them, to the caller's
  // output.
  static __device__ __forceinline__ void store_chunks(const RowPair<T>& rows, int pair, int lane, const float4& first,
                                                      const float4& second) {
    const int column = pair / 4 * 64 + 16 * (lane & 3) + 2 * (pair & 3);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows.row[i] == nullptr) continue;
      *reinterpret_cast<uint32_t*>(rows.row[i] + column) = i ? pack(first.z, second.z, T()) : pack(first.x, second.x, T());
      *reinterpret_cast<uint32_t*>(rows.row[i] + column + 8) = i ? pack(first.w, second.w, T()) : pack(first.y, second.y, T());
    }
  }

  // Two finished latents of rows g and g + 8: number unit % 8 of a lane's 16, and the eighth after it. Lanes i and i + 16
  // have neighbouring units, and trade, so that each stores a pair.
  static __device__ __forceinline__ void store_unit(const RowPair<T>& rows, int unit, int lane, const float4& value) {
    const bool odd = unit & 1;
    const int column = unit / 8 * 64 + 16 * (lane & 3) + (unit & 6) + 8 * odd;
    const float first = __shfl_xor_sync(0xFFFFFFFFu, odd ? value.x : value.y, 16);
    const float second = __shfl_xor_sync(0xFFFFFFFFu, odd ? value.z : value.w, 16);
    if (rows.row[0] != nullptr) {
      *reinterpret_cast<uint32_t*>(rows.row[0] + column) = odd ? pack(first, value.y, T()) : pack(value.x, first, T());
    }
    if (rows.row[1] != nullptr) {
      *reinterpret_cast<uint32_t*>(rows.row[1] + column) = odd ? pack(second, value.w, T()) : pack(value.z, second, T());
    }
  }

  // 64 finished latents from `column` on to the caller's output, rows times scale[0] and scale[1].
  static __device__ __forceinline__ void store(const RowPair<T>& rows, int column, int lane, const float (&o)[8][4],
                                               const float (&scale)[2]) {
    column += 16 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows.row[i] == nullptr) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          word[k] = pack(o[2 * k][2 * i + e] * scale[i], o[2 * k + 1][2 * i + e] * scale[i], T());
        }
        *reinterpret_cast<uint4*>(rows.row[i] + column + 8 * e) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }

 private:
  // Byte kByte of the words: one latent, the tokens as inner dimension.
  template <int kByte>
  static __device__ __forceinline__ void add_latent(float (&o)[4], const uint32_t (&weight)[4], const uint32_t (&v)[4][2],
                                                    int word) {
    mma(o, weight, shifted_codes(byte_pair<kByte, 4 + kByte>(v[0][word], v[1][word])),
        shifted_codes(byte_pair<kByte, 4 + kByte>(v[2][word], v[3][word])), T());
  }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_FP8_CUH_
