// The ring kernel's merge where items have many parts: as merge.cuh, but they come by bulk copies into the ring, which has
// nothing else to do by then. (Few parts are many bytes of each: their additions are better done while the next ones come.)
#ifndef MLA_HOPPER_RING_MERGE_CUH_
#define MLA_HOPPER_RING_MERGE_CUH_

#include "merge.cuh"
#include "ring.cuh"

namespace mla_hopper {

constexpr int kUnitBytes = kUnitElements * static_cast<int>(sizeof(uint4));
constexpr int kSetUnits = kUnits / 2;  // units with the same factors: a value warp's
constexpr int kManyParts = 16;  // where items may have so many it is faster (NOTES_hopper.md)
constexpr int kMostRingParts = kMostParts + 1;

// 256 threads add up this CTA's share of a split item, units [begin, begin + count) of all parts.
template <typename T, typename L>
class RingMerge {
 public:
  static constexpr int kRoom = L::kWeights - L::kCache;    // for units of the parts
  static constexpr int kExchange = L::kQuery;              // float4[8 warps, 2, 32 lanes]: shares of a sum
  static constexpr int kPartWeights = kExchange + 8 * 1024;  // float[2 sets of units, parts, kStride]
  static constexpr int kStride = 17;                       // the 16 rows, and one so that parts differ in banks
  static_assert(kMostRingParts * kUnitBytes <= kRoom, "one unit of all parts must fit");
  static_assert(kPartWeights + 2 * kMostRingParts * kStride * 4 <= L::kCache, "two sets' weights must fit");

  __device__ __forceinline__ RingMerge(const Params& params, char* smem, uint32_t base, uint32_t full, int thread)
      : params_(params), smem_(smem), base_(base), full_(full), thread_(thread) {}

  __device__ __forceinline__ void run(const Split& split) {
    fence_async_proxy();
    named_sync(kMergeBarrier, kMergeThreads);  // all are done with the ring
    const int units = params_.row_groups * kUnits;
    const int share = (units + split.parts - 1) / split.parts;
    const int begin = min(split.mine * share, units);
    const int count = min(share, units - begin);
    const int at_once = min(count, kRoom / (split.parts * kUnitBytes));
    if (count > 0) {
      if (thread_ < 32) {
        if (thread_ == 0) await_parts(params_, split);
        __syncwarp();
        MLA_TRACE_IN(params_, 11);
        fence_async_proxy_global();  // what was announced had been written by ordinary stores
        load(split, begin, at_once);
      }
      named_sync(kMergeBarrier, kMergeThreads);  // all may read what was announced
      part_weights(split, begin, count);
      MLA_TRACE_IN(params_, 13);
      named_sync(kMergeBarrier, kMergeThreads);
#pragma unroll 1
      for (int first = 0; first < count; first += at_once) {
        if (first > 0) {
          fence_async_proxy();
          named_sync(kMergeBarrier, kMergeThreads);  // all have read the last ones
          if (thread_ < 32) load(split, begin + first, min(at_once, count - first));
        }
        mbarrier_wait(full_, phase_);
        phase_ ^= 1;
        add(split, begin, begin + first, min(at_once, count - first));
      }
    }
    MLA_TRACE_IN(params_, 14);
    leave_counters(params_, split, thread_);
  }

 private:
  // One warp asks for units [first, first + count) of all parts: the parts one after the other.
  __device__ __forceinline__ void load(const Split& split, int first, int count) const {
    const int lane = thread_;
    const uint32_t bytes = count * kUnitBytes;
    if (lane == 0) mbarrier_expect(full_, split.parts * bytes);
    __syncwarp();
#pragma unroll 1
    for (int part = lane; part < split.parts; part += 32) {
      const uint4* units = part_at(params_, part_index(params_, split, part)) + kFactorElements;
      bulk_copy(base_ + L::kCache + part * bytes, units + first * kUnitElements, bytes, full_, kReadOnce);
    }
  }

  // Weight of every part, exp2(its maximum - the largest) / denominator, times what undoes its packing, for the rows of the
  // units: 16 threads a row.
  __device__ __forceinline__ void part_weights(const Split& split, int begin, int count) const {
    constexpr int kEach = (kMostRingParts + 15) / 16;  // parts that a thread looks at
    const int row = thread_ / 16, lane = thread_ & 15;
    float* weights = reinterpret_cast<float*>(smem_ + kPartWeights) + row;
#pragma unroll 1
    for (int set = begin / kSetUnits; set * kSetUnits < begin + count; ++set, weights += split.parts * kStride) {
      const int group = set / 2;  // of rows
      float2 stat[kEach];
      float factor[kEach];
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int part = lane + 16 * i;
        stat[i] = make_float2(-INFINITY, 0.f);
        if (part < split.parts) {
          const int index = part_index(params_, split, part);
          stat[i] = __ldcg(params_.stats + index * 64 + group * 16 + row);
          factor[i] = __ldcg(reinterpret_cast<const float*>(part_at(params_, index)) + set * 16 + row % 8 * 2 + row / 8);
        }
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) maximum = fmaxf(maximum, stat[i].x);
#pragma unroll
      for (int bit = 1; bit < 16; bit *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, bit));
      const float reference = maximum == -INFINITY ? 0.f : maximum;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        stat[i].x = exp2_approximate(stat[i].x - reference);
        sum += stat[i].y * stat[i].x;
      }
#pragma unroll
      for (int bit = 1; bit < 16; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
      const float inverse = sum == 0.f ? 0.f : __frcp_rn(sum);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int part = lane + 16 * i;
        if (part < split.parts) weights[part * kStride] = stat[i].x * inverse * factor[i];
      }
      // Of the CTAs that share a row group, the one with its first unit.
      if (lane == 0 && set % 2 == 0 && set * kSetUnits >= begin) {
        store_lse(params_, row_table<L>(smem_), split.item, group * 16 + row, maximum, sum);
      }
    }
  }

  // Adds up units [first, first + count) of those that begin at `begin`, a team of warps half a unit at a time, each warp
  // every `members`-th part of it.
  __device__ __forceinline__ void add(const Split& split, int begin, int first, int count) const {
    const int warp = thread_ / 32, lane = thread_ & 31;
    const int members = count > 2 ? 1 : (count > 1 ? 2 : 4);
    const int member = warp & (members - 1);
    const int step = count * (kUnitBytes / 16);  // from part to part
    const uint4* parts = reinterpret_cast<const uint4*>(smem_ + L::kCache) + lane;
#pragma unroll 1
    for (int half = warp / members; half < 2 * count; half += 8 / members) {
      const int unit = first + half / 2;
      const float* weight = reinterpret_cast<const float*>(smem_ + kPartWeights) +
                            (unit / kSetUnits - begin / kSetUnits) * split.parts * kStride + lane / 4;
      float4 sum[2] = {make_float4(0.f, 0.f, 0.f, 0.f), make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll 4
      for (int part = member; part < split.parts; part += members) {
        add_packed(sum[0], sum[1], parts[part * step + half * 32], weight[part * kStride], weight[part * kStride + 8]);
      }
      if (members > 1) add_members(sum, reinterpret_cast<float4*>(smem_ + kExchange), warp, member, members, lane);
      if (member == 0) {
        const RowPair<T> rows(params_, row_table<L>(smem_), split.item, unit / kUnits * 16 + lane / 4);
        rows.store(unit % kUnits * 32 + (half & 1) * 16, lane, sum[0], sum[1]);
      }
    }
  }

  const Params& params_;
  char* smem_;
  uint32_t base_, full_;
  int thread_;
  uint32_t phase_ = 0;
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_MERGE_CUH_
