// What a CTA merges of a split item, and with which weights.
#ifndef MLA_HOPPER_PART_WEIGHTS_CUH_
#define MLA_HOPPER_PART_WEIGHTS_CUH_

#include "epilogue.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// A CTA takes part in at most two split items: its first (whose beginning is elsewhere) and its last. They wait for the
// merge in shared memory, Split[2].
struct Split {
  int item;
  int head;   // CTA that computed the first part
  int parts;  // 0: nothing to merge
  int mine;   // which part this CTA computed
};

// Which of all CTAs' parts is the item's `part`: the first is the last work of its CTA (slot 1), every other the first work of
// its CTA (slot 0).
__device__ __forceinline__ int part_index(const Params& params, const Split& split, int part) {
  return 2 * (split.head + part * params.m_tiles) + (part == 0);
}

// The units [begin, begin + count) that a CTA merges, `most` of them at most.
struct Share {
  int most, begin, count;
  __device__ __forceinline__ Share(const Params& params, const Split& split) {
    const int units = params.row_groups * kUnits;
    most = Divisor(split.parts).ceil(units);
    begin = min(split.mine * most, units);
    count = min(most, units - begin);
  }
};

// Weights in shared memory: float[row groups from the share's first on, parts, kWeightStride], for 16 rows each.
constexpr int kWeightStride = 17;  // so that parts differ in banks
constexpr int kPartsBound = kMostParts + 1;

__device__ __forceinline__ int weight_offset(const Split& split, const Share& share, int unit) {
  return (unit / kUnits - share.begin / kUnits) * split.parts * kWeightStride;
}

// Weight of every part, exp2(its maximum - the largest) / denominator, for the rows of the share, by kThreads threads. The CTA
// with a row group's first unit stores lse.
template <int kThreads>
__device__ __forceinline__ void part_weights(const Params& params, const RowTable& table, const Split& split,
                                             const Share& share, int thread, float* weights) {
  constexpr int kLanes = kThreads / 16;                        // of a row
  constexpr int kEach = (kPartsBound + kLanes - 1) / kLanes;  // parts that a lane looks at
  const int row = thread / kLanes, lane = thread % kLanes;
  weights += row;
#pragma unroll 1
  for (int group = share.begin / kUnits; group * kUnits < share.begin + share.count; ++group) {
    float2 stat[kEach];
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int part = lane + kLanes * i;
      stat[i] = make_float2(-INFINITY, 0.f);
      if (part < split.parts) stat[i] = __ldcg(params.stats + part_index(params, split, part) * 64 + group * 16 + row);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) maximum = fmaxf(maximum, stat[i].x);
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, bit));
    const float reference = maximum == -INFINITY ? 0.f : maximum;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      stat[i].x = exp2_approximate(stat[i].x - reference);
      sum += stat[i].y * stat[i].x;
    }
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    const float inverse = inverse_of(sum);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int part = lane + kLanes * i;
      if (part < split.parts) weights[part * kWeightStride] = stat[i].x * inverse;
    }
    weights += split.parts * kWeightStride;
    if (lane == 0 && group * kUnits >= share.begin) store_lse(params, table, split.item, group * 16 + row, maximum, sum);
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PART_WEIGHTS_CUH_
