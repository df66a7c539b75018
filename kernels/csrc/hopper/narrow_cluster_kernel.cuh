// The kernel with 16 query rows a CTA where clusters share the tiles of an item (launch_choice.cuh says when). Which tiles a
// CTA takes follows from its place in the grid, whatever the lengths: it asks for its pages, the query and the length at
// once, without a schedule. The teams work as in narrow.cuh; narrow_cluster.cuh adds up.
//
// The grid: all CTAs that share an item's tiles along x, 16 query rows each along y, items along z.
#ifndef MLA_HOPPER_NARROW_CLUSTER_KERNEL_CUH_
#define MLA_HOPPER_NARROW_CLUSTER_KERNEL_CUH_

#include "load.cuh"
#include "narrow_16bit.cuh"
#include "narrow_cluster.cuh"
#include "narrow_fp8.cuh"
#include "narrow_steps.cuh"

namespace mla_hopper {

// The pages of the CTA's next 32 tiles, of which `tile` is the first: lane i's is the i-th. What lies past the item's length
// may be anything, and is not used.
__device__ __forceinline__ int load_pages(const Params& params, const ClusterSeat& seat, int tile, int lane) {
  const int mine = tile + lane * params.shares;
  return mine < params.max_length / kTileTokens ? params.block_table[seat.item * params.block_table_stride + mine] : 0;
}

// One warp: the CTA's tiles of the item into the ring, one of every `shares`. `pages`: those of the first.
template <typename Operands, typename L>
__device__ __forceinline__ void load_share(const Params& params, const CUtensorMap* map, const ClusterSeat& seat, int length,
                                           int pages, const NarrowBarriers<L>& barriers, uint32_t ring, int lane) {
  constexpr int kSteps = kTileTokens / Operands::kStepTokens;  // of a tile
  int tile = seat.share;
#pragma unroll 1
  for (uint32_t step = 0;; ++step) {
    const int part = step % kSteps;
    if (tile * kTileTokens + part * Operands::kStepTokens >= length) break;
    const int page = __shfl_sync(kAllLanes, pages, step / kSteps & 31);
    load_step<Operands>(params, map, barriers, ring, step, page, part, kReadOnce, lane);
    if (part < kSteps - 1) continue;
    tile += params.shares;
    if (step % (32 * kSteps) == 32 * kSteps - 1) pages = load_pages(params, seat, tile, lane);
  }
}

// What a team takes of it.
template <typename Operands>
__device__ __forceinline__ Steps share_of(const Params& params, const ClusterSeat& seat, int length, int team) {
  const int stride = params.shares * kTileTokens;
  const int first = seat.share * kTileTokens;
  if (Operands::kStepTokens == kTileTokens) return {uint32_t(team), length - first - team * stride, kTeams * stride, 0};
  static_assert(Operands::kStepTokens * kTeams == kTileTokens || Operands::kStepTokens == kTileTokens,
                "a team takes its part of each tile, or every other tile");
  return {uint32_t(team), length - first - team * Operands::kStepTokens, stride, 0};
}

template <typename Operands, int kCtas>
__global__ void __launch_bounds__(Operands::L::kThreads, 1)
mla_decode_narrow_cluster_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                                 const __grid_constant__ CUtensorMap cache_map) {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  extern __shared__ __align__(1024) char aligned_smem[];
  char* smem = aligned_smem;
  const uint32_t base = shared_address(smem);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const NarrowBarriers<L> barriers(base + L::kBarriers);
  const ClusterSeat seat = {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
  MLA_TRACE(0);
  const int stored_length = params.lengths[seat.item];
  int pages = 0;
  if (warp == 0) {
    if (lane == 0) barriers.init();
  } else if (warp == 1) {
    if (lane < L::kTableRows) fill_row_table<L>(params, smem, seat.m_tile, lane);
  } else if (warp == 8) {
    pages = load_pages(params, seat, seat.share, lane);
    if (Operands::kStepTokens < kTileTokens && lane == 0) prefetch_tensor_map(&cache_map);
  } else if (warp == 9) {
    if (lane == 0) prefetch_tensor_map(&query_map);
  }
  __syncthreads();
  cluster_arrive();
  MLA_TRACE(1);
  const int length = clamped_length(params, stored_length);
  if (warp >= 8) {
    shrink_registers<kProducerRegisters>();
    if (warp == 8) {
      load_share<Operands, L>(params, &cache_map, seat, length, pages, barriers, base + L::kRing, lane);
    } else if (warp == 9) {
      load_query<L>(params, &query_map, barriers, base + L::kQuery, seat.item, seat.m_tile, lane);
    }
  } else {
    grow_registers<kTeamRegisters>();
    const int thread = threadIdx.x;
    Team<Operands, L> member(params, barriers, smem, base, seat.m_tile, thread);
    typename Operands::Query query;
    mbarrier_wait(barriers.query_full(), 0);
    MLA_TRACE(3);
    query.load(smem + L::kQuery, thread / 32 & 3, lane);
    const ClusterMerge<Operands, kCtas> merge(params, barriers, smem, base, seat, length, thread);
    if (merge.has_part()) {
      const TeamsSum sum = member.run(query, share_of<Operands>(params, seat, length, thread / 128), Operands::kUnit);
      cluster_wait();  // all have their barriers
      merge.send(sum);
      merge.add();
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CLUSTER_KERNEL_CUH_
