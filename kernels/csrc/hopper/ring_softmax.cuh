// Which tokens a query row sees, and the online softmax, on one thread's share of a 64 x 64 tile of scores: 16 columns of
// each of two rows (wgmma.cuh).
#ifndef MLA_HOPPER_RING_SOFTMAX_CUH_
#define MLA_HOPPER_RING_SOFTMAX_CUH_

#include "epilogue.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// `flat`: the thread's first query row; the other is 8 after it.
struct Visibility {
  int hidden[2];    // tokens that the two rows do not see, counted from the item's end
  int always_seen;  // tokens from the item's end on that some row may not see
  int column;       // of the thread's first score

  __device__ __forceinline__ Visibility(const Params& params, int flat, int lane) : hidden{0, 0}, column(2 * (lane & 3)) {
    if (params.causal) {
#pragma unroll
      for (int i = 0; i < 2; ++i) hidden[i] = max(0, params.s_q - 1 - (flat + 8 * i) / params.h_q);
    }
    always_seen = params.causal ? params.s_q - 1 : 0;
  }

  // Applies the scale's sign and hides tokens; `used`: tokens from the tile's first to the item's end.
  __device__ __forceinline__ void mask(const Params& params, float (&s)[32], int used) const {
    if (params.negative) {
#pragma unroll
      for (int j = 0; j < 32; ++j) s[j] = -s[j];
    }
    if (used < kTileTokens + always_seen) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int limit = used - hidden[j & 1] - column - 8 * (j / 2);
        if (limit <= 0) s[2 * j] = -INFINITY;
        if (limit <= 1) s[2 * j + 1] = -INFINITY;
      }
    }
  }
};

// Running reference (log2 units) and this thread's share of the denominator, for two rows. The reference is a maximum that
// is only renewed when a score exceeds it by more than kSlack: weights up to 2^kSlack do no harm, and as a rule neither
// the row's other threads nor the accumulators have to hear of a tile's maximum.
struct LazySoftmax {
  static constexpr float kSlack = 8.f;
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  // Scores to weights, packed in pairs; `alpha` is the factor of what was accumulated before.
  template <typename T>
  __device__ __forceinline__ void weigh(float (&s)[32], float scale_log2, float (&alpha)[2], uint32_t (&p)[2][8]) {
    float largest[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float pairs[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) pairs[j] = fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]);
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = fmaxf(pairs[j], pairs[j + 4]);
      largest[i] = fmaxf(fmaxf(pairs[0], pairs[1]), fmaxf(pairs[2], pairs[3])) * scale_log2;
      alpha[i] = 1.f;
    }
    if (__any_sync(kAllLanes, largest[0] > maximum[0] + kSlack || largest[1] > maximum[1] + kSlack)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(kAllLanes, largest[i], 1));
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(kAllLanes, largest[i], 2));
        largest[i] = fmaxf(largest[i], maximum[i]);
        alpha[i] = exp2_approximate(maximum[i] - (largest[i] == -INFINITY ? 0.f : largest[i]));
        maximum[i] = largest[i];
        sum[i] *= alpha[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float reference = maximum[i] == -INFINITY ? 0.f : maximum[i];
      float partial[2] = {0.f, 0.f};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = exp2_approximate(s[4 * j + 2 * i] * scale_log2 - reference);
        const float y = exp2_approximate(s[4 * j + 2 * i + 1] * scale_log2 - reference);
        partial[0] += x;
        partial[1] += y;
        p[i][j] = pack(x, y, T());
      }
      sum[i] += partial[0] + partial[1];
    }
  }

  // Adds up the row's threads; `inverse` of the denominator, 0 where nothing was seen.
  __device__ __forceinline__ void finish(float (&inverse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      inverse[i] = inverse_of(sum[i]);
    }
  }
};

// Packed weights of a warp's 16 rows to a swizzled slab.
__device__ __forceinline__ void store_weights(uint32_t slab, int warp, const uint32_t (&p)[2][8]) {
  const int lane = lane_index();
  const int row = warp * 16 + (lane & 15);
  const uint32_t address = slab + row * 128 + (((lane >> 4) ^ (row & 7)) << 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    store_fragment(address ^ (j << 5), p[0][2 * j], p[1][2 * j], p[0][2 * j + 1], p[1][2 * j + 1]);
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_SOFTMAX_CUH_
