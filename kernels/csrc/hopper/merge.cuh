// Merges the parts of a split item. Every CTA that computed a part waits for the others (all CTAs of the launch are
// resident, the launch is cooperative) and then merges its own share of the item's output; parts are added in an order
// that depends on their number only, so the result does not depend on who came first.
#ifndef MLA_HOPPER_MERGE_CUH_
#define MLA_HOPPER_MERGE_CUH_

#include "epilogue.cuh"

namespace mla_hopper {

constexpr int kMergeThreads = 256;
constexpr int kMergeBarrier = 4;   // named barriers; 0 is __syncthreads
constexpr int kStoredBarrier = 5;  // and 6: the threads of one half of a part
constexpr int kWeightStride = 65;  // floats between the parts' weights: parts of one row in different banks

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

// One half of a part is in the workspace; says so once each of its 128 threads has stored. `head` as in Split.
__device__ __forceinline__ void announce_part(const Params& params, int head, int half, int thread) {
  named_sync(kStoredBarrier + half, 128);
  if (thread == 0) add_release(params.arrived + head, 1);
}

// One thread: until all parts are in the workspace.
__device__ __forceinline__ void await_parts(const Params& params, const Split& split) {
  const uint32_t wanted = 2 * split.parts;  // both consumer warpgroups of every part
  while (load_acquire(params.arrived + split.head) != wanted) {
  }
}

// This CTA needs the counters no more; the last to say so leaves them as the next launch expects them.
__device__ __forceinline__ void leave_counters(const Params& params, const Split& split, int thread) {
  if (thread == 0) {
    if (atomicAdd(params.finished + split.head, 1u) == static_cast<uint32_t>(split.parts - 1)) {
      params.arrived[split.head] = 0;
      params.finished[split.head] = 0;
    }
  }
}

// Weight of every part for every row, exp2(maximum of the part - maximum) / denominator, into `weights`
// [parts, kWeightStride]; the item's first CTA stores lse.
__device__ __forceinline__ void part_weights(const Params& params, const RowTable& table, const Split& split, int thread,
                                             float* weights) {
  const int rows = params.row_groups * 16;
  float* sums = weights + split.parts * kWeightStride;  // [parts, kWeightStride] again
  {
    const int stride = kMergeThreads / rows;  // parts read at once, each by `rows` neighbouring threads
    int part = thread / rows;
    const int row = thread - part * rows;
    if (part >= stride) part = split.parts;
#pragma unroll 8
    for (; part < split.parts; part += stride) {
      const float2 stat = __ldcg(params.stats + part_index(params, split, part) * 64 + row);
      weights[part * kWeightStride + row] = stat.x;
      sums[part * kWeightStride + row] = stat.y;
    }
  }
  named_sync(kMergeBarrier, kMergeThreads);
  const int lanes = rows <= 16 ? 16 : (rows <= 32 ? 8 : 4);  // neighbouring lanes that share a row
  const int lane = thread & (lanes - 1);
  const int row = thread / lanes;
  if (row >= rows) return;  // whole warps
  float maximum = -INFINITY;
#pragma unroll 1
  for (int part = lane; part < split.parts; part += lanes) {
    maximum = fmaxf(maximum, weights[part * kWeightStride + row]);
  }
#pragma unroll
  for (int offset = 1; offset < 16; offset *= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, maximum, offset);
    if (offset < lanes) maximum = fmaxf(maximum, other);
  }
  const float reference = maximum == -INFINITY ? 0.f : maximum;
  float sum = 0.f;
#pragma unroll 1
  for (int part = lane; part < split.parts; part += lanes) {
    const float weight = exp2_approximate(weights[part * kWeightStride + row] - reference);
    weights[part * kWeightStride + row] = weight;
    sum += sums[part * kWeightStride + row] * weight;
  }
#pragma unroll
  for (int offset = 1; offset < 16; offset *= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
    if (offset < lanes) sum += other;
  }
  const float inverse = sum == 0.f ? 0.f : __frcp_rn(sum);
#pragma unroll 1
  for (int part = lane; part < split.parts; part += lanes) weights[part * kWeightStride + row] *= inverse;
  if (split.mine == 0 && lane == 0) store_lse(params, table, split.item, row, maximum, sum);
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
template <int kSetUnits>
struct PartValues {
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

// kSetUnits: units that a warp stored. `scratch`: shared memory, 2 * parts * kWeightStride floats and 16 KB. Called by
// kMergeThreads threads.
template <typename T, typename Order = ChunkOrder, int kSetUnits = kUnits / 2>
__device__ __forceinline__ void merge(const Params& params, const RowTable& table, const Split& split, int thread,
                                      float* scratch) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  // A CTA takes `share` units, a team of warps one at a time, each warp every `members`-th part of it.
  const int units = params.row_groups * kUnits;
  const int share = (units + split.parts - 1) / split.parts;
  const int begin = min(split.mine * share, units);
  const int count = min(share, units - begin);
  const int members = share > 4 ? 1 : (share > 2 ? 2 : (share > 1 ? 4 : 8));
  const int member = warp & (members - 1);
  const int team = warp / members;
  const int teams = 8 / members;
  const int slot = part_elements(params.row_groups);
  const int step = 2 * params.m_tiles * slot;  // from part to part
  const uint4* source = part_at(params, 2 * split.head);
  float4* exchange = reinterpret_cast<float4*>(scratch + (2 * split.parts * kWeightStride + 3) / 4 * 4);

  if (thread == 0) await_parts(params, split);
  MLA_TRACE(11);
  named_sync(kMergeBarrier, kMergeThreads);
  PartValues<kSetUnits> values;
  // On their way while weights are made.
  if (team < count) values.load(source, slot, step, begin + team, lane, member, members, split.parts);
  part_weights(params, table, split, thread, scratch);
  named_sync(kMergeBarrier, kMergeThreads);
  MLA_TRACE(13);

#pragma unroll 1
  for (int first = 0; first < count; first += teams) {
    const int unit = begin + first + team;
    const bool active = first + team < count;
    const int row = unit / kUnits * 16 + lane / 4;
    float4 sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (active) {
      int part = member;
#pragma unroll 1
      while (true) {
        values.add(sum, scratch + row, part, members, split.parts);
        part += PartValues<kSetUnits>::kBatch * members;
        if (part >= split.parts) break;
        values.load(source, slot, step, unit, lane, part, members, split.parts);
      }
      if (first + teams + team < count) values.load(source, slot, step, unit + teams, lane, member, members, split.parts);
    }
    if (members > 1) add_members(sum, exchange, warp, member, members, lane);
    if (active && member == 0) {
      Order::store(RowPair<T>(params, table, split.item, row), unit % kUnits, lane, sum);
    }
  }
  MLA_TRACE(14);

  named_sync(kMergeBarrier, kMergeThreads);
  leave_counters(params, split, thread);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_MERGE_CUH_
