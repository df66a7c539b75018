// The two teams' sums of a part become one, in the kernel for few query rows.
#ifndef MLA_HOPPER_NARROW_TEAMS_CUH_
#define MLA_HOPPER_NARROW_TEAMS_CUH_

#include "narrow_layout.cuh"
#include "narrow_softmax.cuh"

namespace mla_hopper {

// Both teams' sums of a part, o with the statistics in `softmax`, become one: each team finishes half of every warp's
// latents, 64 of them from 128 block + 64 team on, and gives the other team its share of the other half, through its
// exchange buffer. Values are multiplied by `unit`.
struct TeamsSum {
  float value[8][4];
  float maximum[2], total[2];  // of rows g and g + 8
};

template <typename L>
__device__ __forceinline__ TeamsSum add_teams(char* smem, int thread, const float (&o)[2][8][4], const RowPairSoftmax& softmax,
                                              float unit) {
  const int lane = thread & 31;
  const int block = thread / 32 & 3;
  const int team = thread / 128;
  const int g = lane / 4, c = lane & 3;
  float4* exchange = reinterpret_cast<float4*>(smem + L::kExchange) + block * 256 + lane;
  float2* totals = reinterpret_cast<float2*>(smem + L::kTotals);
  TeamsSum sum;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    exchange[team * (L::kExchangeBytes / 16) + j * 32] = make_float4(o[1][j][0], o[1][j][1], o[1][j][2], o[1][j][3]);
  }
  if (block == 0 && c == 0) {
    totals[team * L::kRows + g] = make_float2(softmax.maximum[0], softmax.sum[0]);
    totals[team * L::kRows + g + 8] = make_float2(softmax.maximum[1], softmax.sum[1]);
  }
  named_sync(kBothTeams, 256);
  float factor[2][2];  // of the row, of its own team's and the other's
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // All warps of a team have the same statistics. Who reads the other team's says so at exchange_empty.
    const float2 mine = make_float2(softmax.maximum[i], softmax.sum[i]);
    const float2 other = totals[(1 - team) * L::kRows + g + 8 * i];
    const float2 a = team ? other : mine, b = team ? mine : other;
    const float largest = fmaxf(a.x, b.x);
    const float reference = largest == -INFINITY ? 0.f : largest;
    const float first = exp2_approximate(a.x - reference);
    const float second = exp2_approximate(b.x - reference);
    sum.maximum[i] = largest;
    sum.total[i] = a.y * first + b.y * second;
    factor[i][0] = (team ? second : first) * unit;
    factor[i][1] = (team ? first : second) * unit;
  }
  const float4* taken = exchange + (1 - team) * (L::kExchangeBytes / 16);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 other = taken[j * 32];
    sum.value[j][0] = o[0][j][0] * factor[0][0] + other.x * factor[0][1];
    sum.value[j][1] = o[0][j][1] * factor[0][0] + other.y * factor[0][1];
    sum.value[j][2] = o[0][j][2] * factor[1][0] + other.z * factor[1][1];
    sum.value[j][3] = o[0][j][3] * factor[1][0] + other.w * factor[1][1];
  }
  return sum;
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_TEAMS_CUH_
