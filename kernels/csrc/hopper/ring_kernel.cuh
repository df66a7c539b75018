// The MLA decode kernel for sm_90a and more than 16 query rows (narrow.cuh is for fewer, and for short batches): one launch,
// one CTA on every multiprocessor.
//
// A CTA holds 64 query rows (rows = queries x heads) and streams 64-token tiles of the latent cache through shared memory,
// each read once and used twice: as keys (576 wide, K-major) and as values (512 wide, MN-major). Warpgroup 0 turns scores
// into softmax weights, warpgroups 1 and 2 accumulate output columns 0..255 and 256..511, warpgroup 3 copies, or unpacks an
// fp8 cache.
// The tensor cores alternate: scores of tile t + 1; values of tile t, while warpgroup 0 makes the weights of tile t + 1.
#ifndef MLA_HOPPER_RING_KERNEL_CUH_
#define MLA_HOPPER_RING_KERNEL_CUH_

#include "load.cuh"
#include "ring_feed.cuh"
#include "ring_merge.cuh"
#include "ring_scores.cuh"
#include "ring_unpack.cuh"
#include "ring_values.cuh"

namespace mla_hopper {

// One warp: output 0 and lse +inf of this group's items without tokens.
template <typename T, typename L>
__device__ __forceinline__ void store_empty_items(const Params& params, const Schedule& schedule, const char* smem, int group,
                                                  int lane) {
  if (!schedule.has_empty_items) return;
#pragma unroll 1
  for (int item = group; item < params.batch; item += params.groups) {
    if (schedule.item_length(item) == 0) store_empty_item<T, 32>(params, row_table<L>(smem), item, lane);
  }
}

template <typename T, typename L>
__global__ void __launch_bounds__(L::kThreads, 1)
mla_decode_ring_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                       const __grid_constant__ CUtensorMap cache_map) {
  MLA_TRACE(0);
  extern __shared__ __align__(1024) char aligned_smem[];
  char* smem = aligned_smem;
  const uint32_t base = shared_address(smem);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const RingBarriers<L> barriers = {base + L::kBarriers};
  if (warp == 0) {
    if (lane == 0) barriers.init();
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, blockIdx.x % params.m_tiles, threadIdx.x - 32);
  } else if (warp == 3) {
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp == 12) {
    prefetch_block_table(params, lane);
  } else if (warp == 13) {
    if (lane == 0) prefetch_tensor_map(&cache_map);
    if (lane == 1) prefetch_tensor_map(&query_map);
  }
  __syncthreads();

  const int cta = blockIdx.x;
  // The compiler puts the last branch first. That must be the producers', and of these the one that feeds the ring: code that
  // nobody has run yet comes from memory, and theirs is what everything else waits for (NOTES_hopper.md).
  if (warp >= 4 && warp < 12) {
    grow_registers<L::kValueRegisters>();
    const int kept = accumulate_tiles<T, L>(params, barriers, smem, base);
    if (kept == kNoneSplit) return;
    RingMerge<T, L> merge(params, smem, base, barriers, threadIdx.x - 128);
#pragma unroll 1
    for (int slot = 1; slot >= 0; --slot) {  // the kept one first: the other's parts need its place
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) merge.run(split, slot, slot == kept);
      MLA_TRACE(15);
    }
  } else if (warp < 4) {
    if constexpr (L::kScoreRegisters > L::kLaunchRegisters) {
      grow_registers<L::kScoreRegisters>();
    } else if constexpr (L::kScoreRegisters < L::kLaunchRegisters) {
      shrink_registers<L::kScoreRegisters>();
    }
    MLA_TRACE(1);
    const int group = cta / params.m_tiles;
    const int m_tile = cta - group * params.m_tiles;
    Schedule schedule(params, group, lane);
    MLA_TRACE(2);
    score_tiles<T, L>(params, &query_map, schedule, barriers, smem, base, cta, group, m_tile, threadIdx.x);
    weigh_parts<L>(params, smem, threadIdx.x);
  } else {
    shrink_registers<L::kProducerRegisters>();
    const int group = cta / params.m_tiles;
    const int m_tile = cta - group * params.m_tiles;
    if constexpr (L::kUnpacks) {
      Schedule schedule(params, group, lane);
      unpack_ring(params, schedule, barriers, base, warp - 12, lane);
      if (warp == 15) store_empty_items<T, L>(params, schedule, smem, group, lane);
    } else if (warp < 15) {
      Schedule schedule(params, group, lane);
      if (warp == 14) {
        store_empty_items<T, L>(params, schedule, smem, group, lane);
      } else if (warp == 13) {
        feed_queries(params, &query_map, schedule, barriers, base, m_tile, lane);
      } else {
        feed_ring(params, &query_map, &cache_map, schedule, barriers, base, m_tile, lane);
      }
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_KERNEL_CUH_
