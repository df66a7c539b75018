// The kernel with 16 query rows a CTA: for no more rows, where memory is the limit, and for short batches, where the time
// to begin and to merge is. Operands go from the cache's bytes in shared memory to registers and no further. A team of
// four warps works on a step of 32 or 64 tokens, each warp on 128 latents of all of them, for the scores and for the
// values alike; the only exchange is that of the four warps' shares of the scores (narrow_steps.cuh). Two teams take steps
// in turn, and add up at an item's end (narrow_teams.cuh). CTAs that share an item meet in the workspace
// (narrow_merge.cuh); in short batches clusters do, in shared memory, which is another kernel (narrow_cluster.cuh).
#ifndef MLA_HOPPER_NARROW_CUH_
#define MLA_HOPPER_NARROW_CUH_

#include "barriers.cuh"
#include "load.cuh"
#include "narrow_16bit.cuh"
#include "narrow_fp8.cuh"
#include "narrow_layout.cuh"
#include "narrow_merge.cuh"
#include "narrow_steps.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// Steps of a part of an item; its last tile may have fewer than others.
template <int kStepTokens>
__device__ __forceinline__ int step_count(const Work& work) {
  const int end = min(work.length, work.last * kTileTokens);
  return (end - work.first * kTileTokens + kStepTokens - 1) / kStepTokens;
}

// An item or a part of one is done: to the output, or to the workspace as the CTA's part `slot` (`item` is then negative).
template <typename Operands>
__device__ __forceinline__ void store_sum(const Params& params, int item, int slot, char* smem, uint32_t barrier, int thread,
                                          const TeamsSum& sum) {
  using L = typename Operands::L;
  const int lane = thread & 31;
  const int block = thread / 32 & 3;
  const int team = thread / 128;
  const int g = lane / 4;
  if (item < 0) {
    NarrowMerge<Operands>(params, smem, barrier, thread).leave(slot, sum);
    return;
  }
  const RowTable table = row_table<L>(smem);
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    inverse[i] = sum.total[i] == 0.f ? 0.f : Operands::kUnit * __frcp_rn(sum.total[i]);
    if (team == 0 && block == 0 && (lane & 3) == 0) {
      store_lse(params, table, item, g + 8 * i, sum.maximum[i], sum.total[i]);
    }
  }
  Operands::store(RowPair<typename Operands::T>(params, table, item, g), block * 128 + team * 64, lane, sum.value, inverse);
}

// Eight warps: every part of the group's piece, to the output or the workspace.
template <typename Operands>
__device__ __forceinline__ void consume_steps(const Params& params, Schedule& schedule,
                                              const NarrowBarriers<typename Operands::L>& barriers, char* smem, uint32_t base,
                                              int m_tile, int thread) {
  using L = typename Operands::L;
  constexpr int kStepTokens = Operands::kStepTokens;
  const int team = thread / 128;
  Team<Operands, L> member(params, barriers, smem, base, m_tile, thread);
  Work work;
  uint32_t step = 0;  // of the CTA's stream, at the item's beginning
  uint32_t items = 0;
  while (schedule.next(work)) {
    typename Operands::Query query;
    mbarrier_wait(barriers.query_full(), items & 1);
    MLA_TRACE(3);
    query.load(smem + L::kQuery, thread / 32 & 3, thread & 31);
    warp_arrive(barriers.query_empty(), thread & 31);
    const uint32_t first = (step ^ team) & 1;
    const int used = work.length - work.first * kTileTokens - first * kStepTokens;
    const Steps steps = {step + first, used, kTeams * kStepTokens, max(0, work.length - work.last * kTileTokens)};
    // Little is kept through the steps: the teams have no registers to spare.
    const int item = work.parts == 1 ? work.item : -1 - (work.part == 0);
    if (item < 0 && thread == 0) {
      const int head = static_cast<int>(blockIdx.x) - work.part * params.m_tiles;
      reinterpret_cast<Split*>(smem + L::kSplits)[-1 - item] = {work.item, head, work.parts, work.part};
    }
    step += step_count<kStepTokens>(work);
    store_sum<Operands>(params, item, -1 - item, smem, barriers.totals_sent(), thread, member.run(query, steps));
    ++items;
  }
}

// One warp: the steps of the group's whole stream into the ring.
template <typename Operands>
__device__ __forceinline__ void load_steps(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                           const NarrowBarriers<typename Operands::L>& barriers, uint32_t ring, int lane) {
  using L = typename Operands::L;
  const uint64_t policy = schedule.cache_policy();
  Work work;
  uint32_t step = 0;
  while (schedule.next(work)) {
    const int32_t* pages = params.block_table + work.item * params.block_table_stride + work.first;
    const int steps = step_count<Operands::kStepTokens>(work);
    constexpr int kSteps = kTileTokens / Operands::kStepTokens;  // of a tile
    int mine = 0;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ++step) {
      const int tile = i / kSteps;
      if (i % (32 * kSteps) == 0) mine = work.first + tile + lane < work.last ? pages[tile + lane] : 0;
      const int page = __shfl_sync(kAllLanes, mine, tile & 31);
      load_step<Operands, L>(params, map, barriers, ring, step, page, i % kSteps, policy, lane);
    }
  }
}

// The launch must be cooperative: CTAs wait for each other's parts.
template <typename Operands>
__global__ void __launch_bounds__(Operands::L::kThreads, 1)
mla_decode_narrow_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                         const __grid_constant__ CUtensorMap cache_map) {
  using L = typename Operands::L;
  using T = typename Operands::T;
  extern __shared__ __align__(1024) char aligned_smem[];
  char* smem = aligned_smem;
  const uint32_t base = shared_address(smem);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const NarrowBarriers<L> barriers(base + L::kBarriers);
  MLA_TRACE(0);
  const Schedule::FirstLengths first_lengths(params, lane);
  if (warp == 0) {
    if (lane == 0) barriers.init();
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, blockIdx.x % params.m_tiles, threadIdx.x - 32);
  } else if (warp == 8) {
    prefetch_block_table(params, lane);
  } else if (warp == 9) {
    if (lane == 0) prefetch_tensor_map(&query_map);
    if (Operands::kStepTokens < kTileTokens && lane == 1) prefetch_tensor_map(&cache_map);
  }
  __syncthreads();
  MLA_TRACE(1);

  // Lane and thread are read anew where they are used: kept, they cost the teams a spill.
  const int group = blockIdx.x / params.m_tiles;
  Schedule schedule(params, group, lane_index(), first_lengths);
  MLA_TRACE(2);
  if (warp >= 8) {
    shrink_registers<kProducerRegisters>();
    if (warp == 8) {
      load_steps<Operands>(params, &cache_map, schedule, barriers, base + L::kRing, lane);
    } else if (warp == 9) {
      load_queries(params, &query_map, schedule, barriers, base + L::kQuery, blockIdx.x - group * params.m_tiles, lane);
    }
  } else {
    grow_registers<kTeamRegisters>();
    if (schedule.has_empty_items) {  // while the first tile is on its way
      const RowTable table = row_table<L>(smem);
#pragma unroll 1
      for (int item = group; item < params.batch; item += params.groups) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, table, item, thread_index());
      }
    }
    const int thread = thread_index();
    consume_steps<Operands>(params, schedule, barriers, smem, base, blockIdx.x - group * params.m_tiles, thread);
    uint32_t merges = 0;
#pragma unroll 1
    for (int slot = 0; slot < 2; ++slot) {
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) merges += NarrowMerge<Operands>(params, smem, barriers.totals_sent(), thread).add(split, merges & 1);
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CUH_
