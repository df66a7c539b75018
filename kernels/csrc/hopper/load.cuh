// Loads that more than one kernel has: the query rows of an item, and the block table's way to L2.
#ifndef MLA_HOPPER_LOAD_CUH_
#define MLA_HOPPER_LOAD_CUH_

#include "barriers.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// The query rows of one item. Rows past the last one are zeros or, in row groups that do not exist, whatever shared
// memory held: they reach no output. One warp.
template <typename L>
__device__ __forceinline__ void load_query(const Params& params, const CUtensorMap* map, const Barriers<L>& barriers,
                                           uint32_t query, int item, int m_tile, int lane) {
  if (lane == 0) mbarrier_expect(barriers.query_full(), kSlabs * params.row_groups * 16 * 128);
  __syncwarp();
  if (lane < kSlabs) {
    tensor_copy(query + lane * L::kQuerySlabBytes, map, barriers.query_full(), lane * kColumns, m_tile * L::kRows, item,
                kKeepInL2);
  }
}

// One warp feeds the query rows of all items.
template <typename L>
__device__ __forceinline__ void load_queries(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                             const Barriers<L>& barriers, uint32_t query, int m_tile, int lane) {
  Work work;
  uint32_t count = 0;
  while (schedule.next(work)) {
    mbarrier_wait(barriers.query_empty(), (count & 1) ^ 1);
    load_query(params, map, barriers, query, work.item, m_tile, lane);
    ++count;
  }
}

// Asks for the block table, so that it is in L2 by the time the schedule says which pages are wanted.
__device__ __forceinline__ void prefetch_block_table(const Params& params, int lane) {
  const int lines = max(1, (params.max_length / kTileTokens + 31) / 32);  // of 128 bytes in a row
  const int index = blockIdx.x * 32 + lane;
  const int item = index / lines;
  if (item < params.batch) {
    prefetch_line(params.block_table + item * params.block_table_stride + index % lines * 32);
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_LOAD_CUH_
