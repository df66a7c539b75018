// From a team's shares of the scores to softmax weights, in the kernel for few query rows.
#ifndef MLA_HOPPER_NARROW_SOFTMAX_CUH_
#define MLA_HOPPER_NARROW_SOFTMAX_CUH_

#include "narrow_layout.cuh"
#include "ptx.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// s becomes the sum of all four warps' shares, in an order that gives them the same bits.
template <int kCount>
__device__ __forceinline__ void add_shares(float4* shares, float (&s)[kCount][4], int block, int team) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) shares[(block * kCount + j) * 32] = make_float4(s[j][0], s[j][1], s[j][2], s[j][3]);
  named_sync(kTeamBarrier + team, 128);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float4 x = shares[((block ^ 1) * kCount + j) * 32];
    const float4 y = shares[((block ^ 2) * kCount + j) * 32];
    const float4 z = shares[((block ^ 3) * kCount + j) * 32];
    s[j][0] = (s[j][0] + x.x) + (y.x + z.x);
    s[j][1] = (s[j][1] + x.y) + (y.y + z.y);
    s[j][2] = (s[j][2] + x.z) + (y.z + z.z);
    s[j][3] = (s[j][3] + x.w) + (y.w + z.w);
  }
}

// Online softmax of a thread's two rows, g and g + 8, in log2 units.
struct RowPairSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  // Turns a step's scores into weights, as `operands` wants them, and says in `alpha` what earlier sums shrink by.
  template <typename Operands, int kGroups>
  __device__ __forceinline__ void add(const float (&s)[kGroups][4], const Operands& operands, float scale_log2,
                                      uint32_t (&weight)[kGroups / 2][4], float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = s[0][2 * i];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      largest = fmaxf(maximum[i], largest * scale_log2);
      const float reference = largest == -INFINITY ? 0.f : largest;
      alpha[i] = maximum[i] == -INFINITY ? 1.f : exp2_approximate(maximum[i] - reference);  // nothing to shrink yet
      maximum[i] = largest;
      float partial = 0.f;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const float x = exp2_approximate(s[j][2 * i] * scale_log2 - reference);
        const float y = exp2_approximate(s[j][2 * i + 1] * scale_log2 - reference);
        partial += x + y;
        weight[j / 2][2 * (j & 1) + i] = operands.weights(x, y, j);
      }
      sum[i] = sum[i] * alpha[i] + partial;
    }
  }

  // The quad's lanes have summed different tokens.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
    }
  }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_SOFTMAX_CUH_
