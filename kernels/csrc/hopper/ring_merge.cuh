// The ring kernel's merge: parts come by bulk copies into the ring, which has nothing else to do by then, in a few steps so
// that additions go on beside them. What the CTA merges of its own last part does not leave it: it waits there from the
// beginning. Warpgroup 0 makes the weights while parts are being stored (weigh_parts).
#ifndef MLA_HOPPER_RING_MERGE_CUH_
#define MLA_HOPPER_RING_MERGE_CUH_

#include "merge.cuh"
#include "ring.cuh"

namespace mla_hopper {

constexpr int kUnitBytes = kUnitElements * static_cast<int>(sizeof(uint4));
constexpr int kSetUnits = kUnits / 2;  // units with the same factors: a value warp's
constexpr int kSetBytes = 8 * static_cast<int>(sizeof(float2));

// Shared memory of the merge. A share of 64 / parts units, rounded up, lies in 4 / parts + 2 row groups at most, and in
// 8 / parts + 2 sets.
template <typename L>
struct RingParts {
  static constexpr int kWeightBytes = (4 + 2 * kPartsBound) * kWeightStride * static_cast<int>(sizeof(float));
  static constexpr int kWeights = L::kQuery;                      // of the parts of two items
  static constexpr int kFactors = L::kCache;                      // float2 [parts, sets, 8]
  static constexpr int kValues = kFactors + 9 * 1024;             // [parts, units of the share]
  static constexpr int kExchange = kValues + (64 + kPartsBound) * kUnitBytes;  // float4 [8 warps, 4, 32 lanes]
  static_assert(kWeights + 2 * kWeightBytes <= L::kRope, "the weights must fit");
  static_assert((8 + 2 * kPartsBound) * kSetBytes <= kValues - kFactors, "the factors must fit");
  static_assert(kExchange + 16 * 1024 <= L::kWeights, "the ring must have room for a share of all parts");

  static __device__ __forceinline__ float* weights(char* smem, int slot) {
    return reinterpret_cast<float*>(smem + kWeights + slot * kWeightBytes);
  }
};

// The set of rows and columns that a value warp has.
__device__ __forceinline__ int value_set() { return (thread_index() / 32 & 3) * 2 + thread_index() / 128 - 1; }

// The sets that a share lies in.
struct ShareSets {
  int first, count;
  __device__ __forceinline__ explicit ShareSets(const Share& share)
      : first(share.begin / kSetUnits), count((share.begin + share.count + kSetUnits - 1) / kSetUnits - first) {}
};

// A value warp's accumulators, 256 columns of 16 rows, to the workspace; what the CTA merges itself (`keeps`) to where the
// merge looks for it. As elsewhere beside accumulators, what is cheap to find again is not kept.
template <typename L>
__device__ __forceinline__ void store_ring_part(const Params& params, const char* smem, uint32_t base, int slot, bool keeps,
                                                const float (&o)[128]) {
  const Split& split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
  const int index = 2 * blockIdx.x + slot;
  uint4* units;
  uint32_t own, kept = 0;  // kept: a bit for each unit
  {
    const Share share(params, split);
    const int set = value_set();
    const int first = share.begin - set * kSetUnits;  // of the share, counted from the set's
    const int from = max(first, 0), to = min(first + share.count, kSetUnits);
    if (keeps && from < to) kept = (1u << to) - (1u << from);
    const int lane = lane_index();
    own = base + RingParts<L>::kValues + (split.mine * share.count - first) * kUnitBytes + lane * 16;
    units = part_at(params, index) + kFactorElements + set * (kSetUnits * kUnitElements) + lane;
  }
  const float2 factors = pack_rows<32>(o, [&](int i, const uint4& packed) {
    if (kept >> i / 2 & 1) {
      store_shared(own + i * 512, {packed.x, packed.y, packed.z, packed.w});
    } else {
      units[i * 32] = packed;
    }
  });
  const int lane = lane_index();
  if ((lane & 3) == 0) {
    const int set = value_set();
    reinterpret_cast<float2*>(part_at(params, index))[set * 8 + lane / 4] = factors;
    if (kept != 0) {
      const ShareSets sets(Share(params, split));
      const uint32_t place = base + RingParts<L>::kFactors + (split.mine * sets.count + set - sets.first) * kSetBytes;
      store_shared(place + lane / 4 * 8, __float_as_uint(factors.x));
      store_shared(place + lane / 4 * 8 + 4, __float_as_uint(factors.y));
    }
  }
}

// Warpgroup 0, once it has no more tiles: the weights of the parts of the CTA's split items.
template <typename L>
__device__ __forceinline__ void weigh_parts(const Params& params, char* smem, int thread) {
  named_sync(kScoresBarrier, 128);  // all are done with the query, and may read the splits
#pragma unroll 1
  for (int slot = 1; slot >= 0; --slot) {
    const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
    if (split.parts == 0) continue;
    const Share share(params, split);
    if (share.count == 0) continue;
    if (thread == 0) await_count(params.counted + split.head, 4 * split.parts);  // warps
    named_sync(kScoresBarrier, 128);
    part_weights<128>(params, row_table<L>(smem), split, share, thread, RingParts<L>::weights(smem, slot));
    named_arrive(kWeighedBarrier + slot, kMergeThreads + 128);
  }
}

// 256 threads add up this CTA's shares of split items.
template <typename T, typename L>
class RingMerge {
 public:
  __device__ __forceinline__ RingMerge(const Params& params, char* smem, uint32_t base, const RingBarriers<L>& barriers,
                                       int thread)
      : params_(params), smem_(smem), base_(base), barriers_(barriers), thread_(thread) {}

  // `kept`: this CTA's own part is there.
  __device__ __forceinline__ void run(const Split& split, int slot, bool kept) {
    fence_async_proxy();
    named_sync(kMergeBarrier, kMergeThreads);  // all are done with the ring
    const Share share(params_, split);
    if (share.count > 0) {
      if (thread_ < 32) {
        if (thread_ == 0) await_parts(params_, split);
        __syncwarp();
        MLA_TRACE_IN(params_, 11);
        fence_async_proxy_global();  // what was announced had been written by ordinary stores
        load(split, share, kept);
      }
      named_sync(kMergeBarrier, kMergeThreads);  // all may read what was announced
      load_factors(split, share, kept);
      named_sync(kWeighedBarrier + slot, kMergeThreads + 128);
      MLA_TRACE_IN(params_, 13);
      const float* weights = RingParts<L>::weights(smem_, slot);
#pragma unroll 1
      for (int first = 0, i = 0; first < share.count; first += kStepUnits, ++i) {
        mbarrier_wait(barriers_.parts_full(i), phase_ >> i & 1);
        phase_ ^= 1 << i;
        add(split, share, weights, first, min(kStepUnits, share.count - first));
      }
    }
    MLA_TRACE_IN(params_, 14);
    leave_counters(params_, split, thread_);
  }

 private:
  static constexpr int kStepUnits = kMergeThreads / 32;
  static_assert(kStepUnits * kMergeSteps >= 2 * kUnits, "a share of two parts must have steps enough");

  // One warp asks for the share of all parts, a step of units after the other.
  __device__ __forceinline__ void load(const Split& split, const Share& share, bool kept) const {
    const int lane = thread_;
    const int copied = split.parts - kept;
#pragma unroll 1
    for (int first = 0, i = 0; first < share.count; first += kStepUnits, ++i) {
      const uint32_t bytes = min(kStepUnits, share.count - first) * kUnitBytes;
      const uint32_t full = barriers_.parts_full(i);
      if (lane == 0) mbarrier_expect(full, copied * bytes);
      __syncwarp();
#pragma unroll 1
      for (int part = lane; part < split.parts; part += 32) {
        if (kept && part == split.mine) continue;
        const uint4* units = part_at(params_, part_index(params_, split, part)) + kFactorElements;
        bulk_copy(base_ + RingParts<L>::kValues + (part * share.count + first) * kUnitBytes,
                  units + (share.begin + first) * kUnitElements, bytes, full, kReadOnce);
      }
    }
  }

  // Too small to be copied in bulk: 8 threads for each part.
  __device__ __forceinline__ void load_factors(const Split& split, const Share& share, bool kept) const {
    const ShareSets sets(share);
    float2* factors = reinterpret_cast<float2*>(smem_ + RingParts<L>::kFactors);
#pragma unroll 1
    for (int part = thread_ / 8; part < split.parts; part += kMergeThreads / 8) {
      if (kept && part == split.mine) continue;
      const float2* source = reinterpret_cast<const float2*>(part_at(params_, part_index(params_, split, part)));
#pragma unroll 1
      for (int set = 0; set < sets.count; ++set) {
        factors[(part * sets.count + set) * 8 + thread_ % 8] = __ldcg(source + (sets.first + set) * 8 + thread_ % 8);
      }
    }
  }

  // Adds up units [first, first + count) of the share, no more than there are warps: a team of warps one, each warp every
  // `members`-th part of it.
  __device__ __forceinline__ void add(const Split& split, const Share& share, const float* weights, int first,
                                      int count) const {
    const int warp = thread_ / 32, lane = thread_ & 31;
    const int members = share.count > 4 ? 1 : (share.count > 2 ? 2 : (share.count > 1 ? 4 : 8));
    const int member = warp & (members - 1);
    const bool active = warp / members < count;
    const int unit = share.begin + first + warp / members;
    float4 sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (active) {
      const ShareSets sets(share);
      const uint4* parts = reinterpret_cast<const uint4*>(smem_ + RingParts<L>::kValues) +
                           (first + warp / members) * kUnitElements + lane;
      const float2* factors = reinterpret_cast<const float2*>(smem_ + RingParts<L>::kFactors) +
                              (unit / kSetUnits - sets.first) * 8 + lane / 4;
      const float* weight = weights + weight_offset(split, share, unit) + lane / 4;
#pragma unroll 2
      for (int part = member; part < split.parts; part += members) {
        const float2 undo = factors[part * sets.count * 8];
        const float low = weight[part * kWeightStride] * undo.x, high = weight[part * kWeightStride + 8] * undo.y;
        const uint4* packed = parts + part * share.count * kUnitElements;
        add_packed(sum[0], sum[1], packed[0], low, high);
        add_packed(sum[2], sum[3], packed[32], low, high);
      }
    }
    if (members > 1) {
      add_members(sum, reinterpret_cast<float4*>(smem_ + RingParts<L>::kExchange), warp, member, members, lane);
    }
    if (active && member == 0) {
      const RowPair<T> rows(params_, row_table<L>(smem_), split.item, unit / kUnits * 16 + lane / 4);
      rows.store(unit % kUnits * 32, lane, sum[0], sum[1]);
      rows.store(unit % kUnits * 32 + 16, lane, sum[2], sum[3]);
    }
  }

  const Params& params_;
  char* smem_;
  uint32_t base_;
  const RingBarriers<L>& barriers_;
  int thread_;
  uint32_t phase_ = 0;  // a bit for each step
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_MERGE_CUH_
