// Warpgroups 1 and 2: each one half of the output columns, from the weights in shared memory and the cache tile.
#ifndef MLA_HOPPER_VALUES_CUH_
#define MLA_HOPPER_VALUES_CUH_

#include "barriers.cuh"
#include "epilogue.cuh"
#include "merge.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

// The values of tokens from `used` on in the four slabs from `slab` on: a softmax weight of 0 would not hide a NaN.
__device__ __forceinline__ void clear_unused(char* stage, int slab, int used, int thread) {
  const int vectors = (kTileTokens - used) * 8;
#pragma unroll 1
  for (int end = slab + 4; slab < end; ++slab) {
    uint4* unused = reinterpret_cast<uint4*>(stage + slab * kSlabBytes + used * 128);
#pragma unroll 1
    for (int i = thread; i < vectors; i += 128) unused[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
}

__device__ __forceinline__ void rescale(float (&o)[128], float low, float high) {
  if (__all_sync(kAllLanes, low == 1.f && high == 1.f)) return;
#pragma unroll
  for (int i = 0; i < 128; i += 4) {
    o[i] *= low;
    o[i + 1] *= low;
    o[i + 2] *= high;
    o[i + 3] *= high;
  }
}

// Split parts: the warpgroup's share is in the workspace; says so once every thread of it has stored.
__device__ __forceinline__ void announce_part(const Params& params, const Work& work, int m_tile, int half, int thread) {
  named_sync(kStoredBarrier + half, 128);
  if (thread == 0) {
    add_release(params.arrived + work.head_group * params.m_tiles + m_tile, 1);
  }
}

template <typename T, typename L>
__device__ __forceinline__ void accumulate_values(const Params& params, Schedule& schedule, const Barriers<L>& barriers,
                                                  char* smem, uint32_t base, int cta, int group, int m_tile, int half,
                                                  int thread) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int row = warp * 16 + lane / 4;
  const float* alpha_shared = reinterpret_cast<const float*>(smem + L::kAlpha);
  const float* inverse_shared = reinterpret_cast<const float*>(smem + L::kInverse);
  const RowTable table = row_table<L>(smem);

  float o[128];
  Work work;
  uint32_t tile = 0;
  while (schedule.next(work)) {
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      const uint32_t stage = tile % L::kStages;
      const uint32_t stage_offset = L::kCache + stage * kTileBytes;
      mbarrier_wait(barriers.full(stage, piece_of_values(half, 0)), tile / L::kStages & 1);
      mbarrier_wait(barriers.full(stage, piece_of_values(half, 1)), tile / L::kStages & 1);
      const int used = work.length - t * kTileTokens;
      if (used < kTileTokens) clear_unused(smem + stage_offset, 4 * half, used, thread);
      named_sync(kWeightsReady, 384);
      const uint64_t weights = matrix_descriptor(base + L::kWeights, 16, 1024);
      const float low = alpha_shared[row], high = alpha_shared[row + 8];
      if (t > work.first) rescale(o, low, high);
      const uint64_t values = matrix_descriptor(base + stage_offset + 4 * half * kSlabBytes, kSlabBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T>::template values<0>(o, weights + (k * 32 >> 4), values + (k * 2048 >> 4), k > 0 || t > work.first);
      }
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T>::template values<64>(o, weights + (k * 32 >> 4), values + ((2 * kSlabBytes + k * 2048) >> 4),
                                      k > 0 || t > work.first);
      }
      wgmma_commit();
      wgmma_wait<1>();
      release(barriers, stage, piece_of_values(half, 0), lane);
      wgmma_wait<0>();
      if (t < work.last - 1) named_arrive(kWeightsFree, 384);
      release(barriers, stage, piece_of_values(half, 1), lane);
    }

    named_sync(kInverseReady, 384);
    const float inverse[2] = {inverse_shared[row], inverse_shared[row + 8]};
    named_arrive(kWeightsFree, 384);  // only now may warpgroup 0 run into its next item's end
    if (work.parts == 1) {
      store_output<T>(params, table, work.item, warp, half, lane_index(), o, inverse);
    } else {
      const int slot = group == work.head_group;
      if (half == 0 && thread == 0) {
        reinterpret_cast<Split*>(smem + L::kSplits)[slot] = {work.item, work.head_group * params.m_tiles + m_tile, work.parts,
                                                             group - work.head_group};
      }
      store_partial(params, cta, slot, warp, half, lane_index(), o);
      announce_part(params, work, m_tile, half, thread);
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_VALUES_CUH_
