// The ring's producers: bulk tensor copies of query rows and cache tiles. One warp each for the ring and for the query
// slabs that stay in shared memory, so that neither waits for the other's room.
#ifndef MLA_HOPPER_RING_FEED_CUH_
#define MLA_HOPPER_RING_FEED_CUH_

#include "ring.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// Waits for the next place of the ring and fills it with two slabs, from column `column` on, of rows `y` and on of page or
// item `z`; `bytes` is what a slab has of them. One warp, which arrives for all fillers.
template <typename L>
__device__ __forceinline__ void feed_piece(const CUtensorMap* map, const RingBarriers<L>& barriers,
                                           RingPosition<L>& position, uint32_t base, int column, int y, int z, int bytes,
                                           uint64_t policy, int lane) {
  const uint32_t full = barriers.full(position.slot);
  mbarrier_wait(barriers.empty(position.slot), position.parity ^ 1);
  if (lane == 0) mbarrier_expect(full, 2 * bytes);
  if (L::kFillers > 1 && lane > 0 && lane < L::kFillers) mbarrier_arrive(full);
  __syncwarp();
  if (lane < 2) {
    tensor_copy(position.address(base) + lane * kSlabBytes, map, full, column + lane * kColumns, y, z, policy);
  }
  position.advance(1);
}

// The query slabs of an item that warpgroup 0 moves to registers.
template <typename L>
__device__ __forceinline__ void feed_held_query(const Params& params, const CUtensorMap* map, const RingBarriers<L>& barriers,
                                                RingPosition<L>& position, uint32_t base, int item, int m_tile, int lane) {
#pragma unroll 1
  for (int pair = 0; pair < L::kHeldPairs; ++pair) {
    feed_piece(map, barriers, position, base, pair_slab(pair) * kColumns, m_tile * kTileRows, item,
               params.row_groups * 16 * 128, kKeepInL2, lane);
  }
}

// A tile all at once, in the order of memory, which is faster there; but its first pieces wait for the last one's place. One
// warp, a lane for each slab.
template <typename L>
__device__ __forceinline__ void feed_tile(const CUtensorMap* map, const RingBarriers<L>& barriers, RingPosition<L>& position,
                                          uint32_t rope_parity, uint32_t base, int page, uint64_t policy, int lane) {
  const RingPosition<L> first = position;
#pragma unroll 1
  for (int pair = 0; pair < kTilePairs; ++pair) {
    mbarrier_wait(barriers.empty(position.slot), position.parity ^ 1);
    if (lane == 0) mbarrier_expect(barriers.full(position.slot), kPairBytes);
    position.advance(1);
  }
  mbarrier_wait(barriers.rope_empty(), rope_parity);
  if (lane == 0) mbarrier_expect(barriers.rope_full(), kSlabBytes);
  __syncwarp();
  if (lane < kSlabs) {
    const RingPosition<L> mine = first.ahead(slab_pair(lane));
    const bool rope = lane == kSlabs - 1;
    const uint32_t to = rope ? base + L::kRope : mine.address(base) + (lane & 1) * kSlabBytes;
    tensor_copy(to, map, rope ? barriers.rope_full() : barriers.full(mine.slot), lane * kColumns, 0, page, policy);
  }
}

template <typename L>
__device__ __forceinline__ void feed_ring(const Params& params, const CUtensorMap* query_map, const CUtensorMap* cache_map,
                                          Schedule& schedule, const RingBarriers<L>& barriers, uint32_t base, int m_tile,
                                          int lane) {
  const uint64_t policy = schedule.cache_policy();
  RingPosition<L> position;
  uint32_t rope_parity = 1;
  Work work;
  while (schedule.next(work)) {
    const int32_t* pages = params.block_table + work.item * params.block_table_stride;
    int mine = work.first + lane < work.last ? pages[work.first + lane] : 0;  // one of 32 tiles' pages
    feed_held_query(params, query_map, barriers, position, base, work.item, m_tile, lane);
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t) {
      const int within = (t - work.first) & 31;
      if (within == 0 && t > work.first) mine = t + lane < work.last ? pages[t + lane] : 0;
      const int page = __shfl_sync(kAllLanes, mine, within);
      if (schedule.shared_by_all) {
        feed_tile(cache_map, barriers, position, rope_parity, base, page, policy, lane);
      } else {
#pragma unroll 1
        for (int pair = 0; pair < kTilePairs; ++pair) {
          feed_piece(cache_map, barriers, position, base, pair_slab(pair) * kColumns, 0, page, kSlabBytes, policy, lane);
        }
        mbarrier_wait(barriers.rope_empty(), rope_parity);
        if (lane == 0) {
          mbarrier_expect(barriers.rope_full(), kSlabBytes);
          tensor_copy(base + L::kRope, cache_map, barriers.rope_full(), kLatent, 0, page, policy);
        }
      }
      rope_parity ^= 1;
    }
  }
}

// The other query slabs of an item, where the last item's were; `parity` of query_empty().
template <typename L>
__device__ __forceinline__ void feed_query(const Params& params, const CUtensorMap* map, const RingBarriers<L>& barriers,
                                           uint32_t base, int item, int m_tile, uint32_t parity, int lane) {
  const int slab = lane == 0 ? kSlabs - 1 : pair_slab(L::kHeldPairs + (lane - 1) / 2) + ((lane - 1) & 1);
  mbarrier_wait(barriers.query_empty(), parity);
  if (lane == 0) mbarrier_expect(barriers.query_full(), L::kQuerySlabs * params.row_groups * 16 * 128);
  __syncwarp();
  if (lane < L::kQuerySlabs) {
    tensor_copy(base + L::kQuery + lane * kSlabBytes, map, barriers.query_full(), slab * kColumns, m_tile * kTileRows, item,
                kKeepInL2);
  }
}

template <typename L>
__device__ __forceinline__ void feed_queries(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                             const RingBarriers<L>& barriers, uint32_t base, int m_tile, int lane) {
  Work work;
  uint32_t parity = 1;
  while (schedule.next(work)) {
    feed_query(params, map, barriers, base, work.item, m_tile, parity, lane);
    parity ^= 1;
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_FEED_CUH_
