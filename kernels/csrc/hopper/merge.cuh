// What merges of split items share: how CTAs tell each other that their parts are in the workspace (all CTAs of the launch are
// resident, the launch is cooperative), and how the warps of a CTA that share a unit add up.
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

}  // namespace mla_hopper

#endif  // MLA_HOPPER_MERGE_CUH_
