// Warpgroups 1 and 2 of the ring kernel: each one half of the output columns.
#ifndef MLA_HOPPER_RING_VALUES_CUH_
#define MLA_HOPPER_RING_VALUES_CUH_

#include "epilogue.cuh"
#include "ring.cuh"
#include "ring_merge.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

// The values of tokens from `used` on in one pair of slabs: a softmax weight of 0 would not hide a NaN.
__device__ __forceinline__ void clear_pair(uint32_t pair, int used, int thread) {
  const int bytes = (kTileTokens - used) * 128;
#pragma unroll 1
  for (int i = thread * 16; i < 2 * bytes; i += 128 * 16) {
    const uint32_t address = pair + used * 128 + (i < bytes ? i : i - bytes + kSlabBytes);
    store_zeros(address);
  }
}

// This thread's two rows of a float[64] in shared memory.
struct RowFactors {
  float low, high;
  __device__ __forceinline__ explicit RowFactors(uint32_t factors) {
    const int thread = thread_index();
    const uint32_t address = factors + (thread / 32 & 3) * 64 + (thread / 4 & 7) * 4;
    low = load_shared<float>(address);
    high = load_shared<float>(address + 32);
  }
};

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

constexpr int kNoneSplit = -2;

// 128 registers hold the output, so what is cheap to find again is not kept; addresses of operands are in uniform ones.
// Returns the slot of the part whose share the merge finds in the ring, -1 if that is none, kNoneSplit if there is nothing to
// merge.
template <typename T, typename L>
__device__ __forceinline__ int accumulate_tiles(const Params& params, const RingBarriers<L>& barriers, char* smem,
                                                uint32_t base) {
  // With 64 or 128 rows memory is the limit, and waiting would keep pieces from their next tile. Nor may a tile wait for the
  // next one in a ring that has no room for both.
  const bool in_turns = L::kSlots >= 2 * kTilePairs && params.m_tiles > 2;
  float o[128];
  RingPosition<L> position;
  position.slot = __reduce_max_sync(kAllLanes, threadIdx.x / 256);  // reductions give uniform registers
  uint32_t tile = 0;
  int kept = kNoneSplit;
#pragma unroll 1
  for (uint32_t item = 0;; ++item) {
    mbarrier_wait(barriers.written(tile), pair_parity(tile));
    const uint32_t task = base + L::kTasks + (item & 1) * static_cast<uint32_t>(sizeof(Task));
    int left = load_shared<int>(task + offsetof(Task, tiles));
    if (left == 0) return kept;
    position.advance(L::kHeldPairs);  // the query's pieces
    bool more = false;                         // than the item's first tile
    while (true) {
      MLA_TRACE(3);
      const RingPosition<L> second = position.ahead(2);
      mbarrier_wait(barriers.full(position.slot), position.parity);
      mbarrier_wait(barriers.full(second.slot), second.parity);
      if (more) {
        const RowFactors alpha(base + L::kAlpha + (tile & 1) * 256);
        rescale(o, alpha.low, alpha.high);
      }
      if (left > 1) {
        // The tensor cores have the next tile's scores first, if that tile is there, and these values while its weights
        // are made.
        const RingPosition<L> next = position.ahead(kTilePairs);
        if (in_turns && __all_sync(kAllLanes, mbarrier_test(barriers.full(next.slot), next.parity))) {
          mbarrier_wait(barriers.scored(tile + 1), pair_parity(tile + 1));
        }
      } else {
        const int tail = load_shared<int>(task + offsetof(Task, tail));
        if (tail < kTileTokens) {
          clear_pair(position.address(base), tail, thread_index() & 127);
          clear_pair(second.address(base), tail, thread_index() & 127);
          fence_async_proxy();
          named_sync(kStoredBarrier - 1 + thread_index() / 128, 128);
        }
      }
      MLA_TRACE(4);
      const uint64_t weights = matrix_descriptor(base + L::kWeights + (tile & 1) * kSlabBytes, 16, 1024);
      const uint64_t first_values = matrix_descriptor(position.address(base), kSlabBytes, 1024);
      const uint64_t second_values = matrix_descriptor(second.address(base), kSlabBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T>::template values<0>(o, weights + (k * 32 >> 4), first_values + (k * 2048 >> 4), k > 0 || more);
      }
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T>::template values<64>(o, weights + (k * 32 >> 4), second_values + (k * 2048 >> 4), k > 0 || more);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (lane_index() == 0) mbarrier_arrive(barriers.empty(position.slot));
      wgmma_wait<0>();
      if (lane_index() == 0) {
        mbarrier_arrive(barriers.empty(second.slot));
        if (left > 1) mbarrier_arrive(barriers.read(tile));
      }
      MLA_TRACE(5);
      position.advance(kTilePairs);
      more = true;
      if (--left == 0) break;
      ++tile;
      mbarrier_wait(barriers.written(tile), pair_parity(tile));
    }

    mbarrier_wait(barriers.inverted(item), pair_parity(item));
    MLA_TRACE(6);
    const RowFactors inverse(base + L::kInverse + (item & 1) * 256);
    const Task done = reinterpret_cast<const Task*>(smem + L::kTasks)[item & 1];
    __syncwarp();
    if (lane_index() == 0) mbarrier_arrive(barriers.read(tile));  // only now: it frees the item's task and inverse too
    ++tile;
    const int half = thread_index() / 128 - 1;
    const int warp = thread_index() / 32 & 3;
    if (done.parts > 1) {
      kept = -1;
      if (done.last) {
        kept = done.slot;
        named_sync(kMergeBarrier, kMergeThreads);  // both warpgroups are done with the ring
      }
      if (warp < params.row_groups) store_ring_part<L>(params, smem, base, done.slot, done.last, o);
      MLA_TRACE(7);
      announce_part(params, done.head, half, thread_index() & 127);
      MLA_TRACE(8);
    } else {
      store_output<T>(params, row_table<L>(smem), done.item, warp, half, lane_index(), o,
                      {inverse.low, inverse.high});
      MLA_TRACE(7);
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_VALUES_CUH_
