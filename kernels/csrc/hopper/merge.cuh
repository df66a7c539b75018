// Merges the parts of a split item in the kernel for few rows; ring_merge.cuh is for more. Every CTA that computed a part waits
// for the others (all CTAs of the launch are resident, the launch is cooperative) and then merges its own share of the item's
// output; parts are added in an order that depends on their number only, so the result does not depend on who came first.
#ifndef MLA_HOPPER_MERGE_CUH_
#define MLA_HOPPER_MERGE_CUH_

#include "part_weights.cuh"

namespace mla_hopper {

constexpr int kMergeThreads = 256;
constexpr int kMergeBarrier = 4;   // named barriers; 0 is __syncthreads
constexpr int kStoredBarrier = 5;  // and 6: the threads of one half of a part
constexpr int kScoresBarrier = 7;   // the ring kernel's warpgroup 0
constexpr int kWeighedBarrier = 8;  // and 9: it has the weights of a split's parts

// One half of a part is in the workspace; says so once each of its 128 threads has stored. `head` as in Split.
__device__ __forceinline__ void announce_part(const Params& params, int head, int half, int thread) {
  named_sync(kStoredBarrier + half, 128);
  if (thread == 0) add_release(params.arrived + head, 1);
}

// One thread: until a counter has come to `wanted`.
__device__ __forceinline__ void await_count(const uint32_t* counter, uint32_t wanted) {
  while (load_acquire(counter) != wanted) {
  }
}
// Until all parts are in the workspace.
__device__ __forceinline__ void await_parts(const Params& params, const Split& split) {
  await_count(params.arrived + split.head, 2 * split.parts);  // both halves of each
}

// This CTA needs the counters no more; the last to say so leaves them as the next launch expects them.
__device__ __forceinline__ void leave_counters(const Params& params, const Split& split, int thread) {
  if (thread == 0) {
    if (atomicAdd(params.finished + split.head, 1u) == static_cast<uint32_t>(split.parts - 1)) {
      params.counted[split.head] = 0;
      params.arrived[split.head] = 0;
      params.finished[split.head] = 0;
    }
  }
}

// The first warp of each team of `members` gets the team's sum. All merging warps take part, once in a merge. `exchange`:
// kChunks * 4 KB of shared memory.
template <int kChunks>
__device__ __forceinline__ void add_members(float4 (&sum)[kChunks], float4* exchange, int warp, int member, int members,
                                            int lane) {
  float4* mine = exchange + warp * (kChunks * 32) + lane;
  if (member > 0) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) mine[i * 32] = sum[i];
  }
  named_sync(kMergeBarrier, kMergeThreads);
  if (member > 0) return;
#pragma unroll 1
  for (int other = 1; other < members; ++other) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float4 value = mine[(other * kChunks + i) * 32];
      sum[i].x += value.x;
      sum[i].y += value.y;
      sum[i].z += value.z;
      sum[i].w += value.w;
    }
  }
}

// A unit of up to kBatch parts, every `members`-th from `part` on.
struct PartValues {
  static constexpr int kSetUnits = 2;  // that a warp of the kernel for few rows stores
  static constexpr int kBatch = 4;
  uint4 value[kBatch][2];
  float2 factor[kBatch];

  // `parts_of`: the first part, as if in slot 0; `slot` and `step` lead to its slot and to the next part.
  __device__ __forceinline__ void load(const uint4* parts_of, int slot, int step, int unit, int lane, int part, int members,
                                       int parts) {
    const uint4* units = parts_of + kFactorElements + unit * kUnitElements + lane;
    const float2* factors = reinterpret_cast<const float2*>(parts_of) + unit / kSetUnits * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int p = part + j * members;
      if (p < parts) {
        const int offset = p * step + (p == 0 ? slot : 0);
        factor[j] = __ldcg(factors + 2 * offset);
#pragma unroll
        for (int i = 0; i < 2; ++i) value[j][i] = __ldcg(units + offset + i * 32);
      }
    }
  }

  __device__ __forceinline__ void add(float4 (&sum)[4], const float* weights, int part, int members, int parts) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int p = part + j * members;
      if (p < parts) {
        const float low = weights[p * kWeightStride] * factor[j].x;
        const float high = weights[p * kWeightStride + 8] * factor[j].y;
        add_packed(sum[0], sum[1], value[j][0], low, high);
        add_packed(sum[2], sum[3], value[j][1], low, high);
      }
    }
  }
};

// The order of a part's elements as store_partial() leaves them: units of four accumulator chunks.
struct ChunkOrder {
  template <typename T>
  static __device__ __forceinline__ void store(const RowPair<T>& rows, int unit, int lane, const float4 (&sum)[4]) {
    rows.store(unit * 32, lane, sum[0], sum[1]);
    rows.store(unit * 32 + 16, lane, sum[2], sum[3]);
  }
};

// `scratch`: shared memory, kPartsBound * kWeightStride floats and 16 KB. Called by kMergeThreads threads.
template <typename T, typename Order>
__device__ __forceinline__ void merge(const Params& params, const RowTable& table, const Split& split, int thread,
                                      float* scratch) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const Share share(params, split);
  // A team of warps takes one unit at a time, each warp every `members`-th part of it.
  const int members = share.most > 4 ? 1 : (share.most > 2 ? 2 : (share.most > 1 ? 4 : 8));
  const int member = warp & (members - 1);
  const int team = warp / members;
  const int teams = 8 / members;
  const int slot = part_elements(params.row_groups);
  const int step = 2 * params.m_tiles * slot;  // from part to part
  const uint4* source = part_at(params, 2 * split.head);
  float4* exchange = reinterpret_cast<float4*>(scratch + (kPartsBound * kWeightStride + 3) / 4 * 4);

  if (thread == 0) await_parts(params, split);
  MLA_TRACE(11);
  named_sync(kMergeBarrier, kMergeThreads);
  PartValues values;
  // On their way while weights are made.
  if (team < share.count) values.load(source, slot, step, share.begin + team, lane, member, members, split.parts);
  part_weights<kMergeThreads>(params, table, split, share, thread, scratch);
  named_sync(kMergeBarrier, kMergeThreads);
  MLA_TRACE(13);

#pragma unroll 1
  for (int first = 0; first < share.count; first += teams) {
    const int unit = share.begin + first + team;
    const bool active = first + team < share.count;
    const float* weight = scratch + weight_offset(split, share, unit) + lane / 4;
    float4 sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (active) {
      int part = member;
#pragma unroll 1
      while (true) {
        values.add(sum, weight, part, members, split.parts);
        part += PartValues::kBatch * members;
        if (part >= split.parts) break;
        values.load(source, slot, step, unit, lane, part, members, split.parts);
      }
      if (first + teams + team < share.count) values.load(source, slot, step, unit + teams, lane, member, members, split.parts);
    }
    if (members > 1) add_members(sum, exchange, warp, member, members, lane);
    if (active && member == 0) {
      Order::store(RowPair<T>(params, table, split.item, unit / kUnits * 16 + lane / 4), unit % kUnits, lane, sum);
    }
  }
  MLA_TRACE(14);

  named_sync(kMergeBarrier, kMergeThreads);
  leave_counters(params, split, thread);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_MERGE_CUH_
