// The MLA decode kernel for sm_90a, an fp8 cache and more than 16 query rows (narrow.cuh is for fewer, ring_kernel.cuh for
// a 16-bit cache): one launch, one CTA on every multiprocessor.
//
// A CTA holds 64 query rows (rows = queries x heads) in shared memory and streams 64-token tiles of the latent cache
// through a ring of raw tokens and one 72 KB stage of 16-bit values, each read once from memory and used twice: as keys
// (576 wide, K-major) and as values (512 wide, MN-major). Warpgroup 0 turns scores into softmax weights, warpgroups 1 and 2
// accumulate output columns 0..255 and 256..511 with them, while warpgroup 0 is at the next tile; warpgroup 3 unpacks.
#ifndef MLA_HOPPER_DECODE_CUH_
#define MLA_HOPPER_DECODE_CUH_

#include "load.cuh"
#include "merge.cuh"
#include "scores.cuh"
#include "unpack.cuh"
#include "values.cuh"

namespace mla_hopper {

template <typename T, typename L>
__global__ void __launch_bounds__(L::kThreads, 1)
mla_decode_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                  const __grid_constant__ CUtensorMap cache_map) {
  MLA_TRACE(0);
  extern __shared__ char dynamic_smem[];
  char* smem = dynamic_smem;
  const uint32_t base = align_shared(smem);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const Barriers<L> barriers = {base + L::kBarriers};
  if (warp == 0) {
    if (lane == 0) init_barriers(barriers);
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, blockIdx.x % params.m_tiles, threadIdx.x - 32);
  } else if (warp == 3) {
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp == 12) {
    prefetch_block_table(params, lane);
  } else if (warp == 13) {
    if (lane == 0) prefetch_tensor_map(&query_map);
  }
  __syncthreads();

  const int cta = blockIdx.x;
  if (warp >= 12) {
    shrink_registers<88>();
    Schedule schedule(params, cta / params.m_tiles, lane);
    unpack_cache(params, schedule, barriers, smem, base, threadIdx.x - 384);
  } else if (warp < 4) {
    shrink_registers<80>();
    MLA_TRACE(1);
    const int group = cta / params.m_tiles;
    const int m_tile = cta - group * params.m_tiles;
    Schedule schedule(params, group, lane);
    MLA_TRACE(2);
    compute_weights<T, L>(params, &query_map, schedule, barriers, smem, base, cta, group, m_tile, threadIdx.x);
  } else {
    grow_registers<168>();
    const int group = cta / params.m_tiles;
    const int m_tile = cta - group * params.m_tiles;
    Schedule schedule(params, group, lane);
    const bool has_empty_items = schedule.has_empty_items;
    const int thread = threadIdx.x - 128;  // of 256
    accumulate_values<T, L>(params, schedule, barriers, smem, base, cta, group, m_tile, thread / 128, thread & 127);
    const RowTable table = row_table<L>(smem);
    if (has_empty_items) {
#pragma unroll 1
      for (int item = group; item < params.batch; item += params.groups) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, table, item, thread);
      }
    }
    named_sync(kMergeBarrier, kMergeThreads);  // both warpgroups are done with the cache stages
#pragma unroll 1
    for (int slot = 0; slot < 2; ++slot) {
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) merge<T>(params, table, split, thread, reinterpret_cast<float*>(smem + L::kCache));
      MLA_TRACE(16 + slot);
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_DECODE_CUH_
