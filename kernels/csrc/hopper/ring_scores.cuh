// Warpgroup 0 of the ring kernel: scores, online softmax, statistics.
#ifndef MLA_HOPPER_RING_SCORES_CUH_
#define MLA_HOPPER_RING_SCORES_CUH_

#include "epilogue.cuh"
#include "merge.cuh"
#include "ring.cuh"
#include "ring_feed.cuh"
#include "ring_softmax.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

// Fragments of this warp's 16 rows and 64 columns of a swizzled slab.
__device__ __forceinline__ void load_fragments(uint32_t (&fragment)[4][4], uint32_t slab, int warp, int lane) {
  const int row = warp * 16 + (lane & 15);
  const uint32_t address = slab + row * 128 + (((lane >> 4) ^ (row & 7)) << 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) load_fragment(fragment[k], address ^ (k << 5));
}

// The scores of one 64 x 64 tile at a time.
template <typename T, typename L>
class RingScores {
 public:
  float s[32];

  __device__ __forceinline__ RingScores(const RingBarriers<L>& barriers, uint32_t base) : barriers_(barriers), base_(base) {}

  // What unpacking warps have no time for: asks for the query slabs of the CTA's `count`-th item. One warp.
  __device__ __forceinline__ void request_query(const Params& params, const CUtensorMap* map, int item, int m_tile,
                                                uint32_t count, int lane) const {
    feed_query(params, map, barriers_, base_, item, m_tile, (count & 1) ^ 1, lane);
    RingPosition<L> position = position_;
    feed_held_query(params, map, barriers_, position, base_, item, m_tile, lane);
  }

  // A new item: its first query slabs from the ring to registers, and the wait for the others.
  __device__ __forceinline__ void load_query(int warp, int lane, uint32_t item) {
#pragma unroll
    for (int pair = 0; pair < L::kHeldPairs; ++pair) {
      mbarrier_wait(barriers_.full(position_.slot), position_.parity);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_fragments(held_[2 * pair + i], position_.address(base_) + i * kSlabBytes, warp, lane);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers_.empty(position_.slot));
      position_.advance(1);
    }
    mbarrier_wait(barriers_.query_full(), item & 1);
  }

  // S = Q K^T. The value warpgroups hear of it when the last slab is still to come: about the time they need to start.
  __device__ __forceinline__ void compute(uint32_t tile, int lane) {
    add_pair<0>();
    add_pair<1>();
    add_pair<2>();
    add_pair<3>();
    wgmma_commit();
    mbarrier_wait(barriers_.rope_full(), tile & 1);
    wgmma_fence();
    const uint64_t query = matrix_descriptor(base_ + L::kQuery, 16, 1024);
    const uint64_t keys = matrix_descriptor(base_ + L::kRope, 16, 1024);
#pragma unroll
    for (int k = 0; k < 4; ++k) Wgmma<T>::scores(s, query + (k * 32 >> 4), keys + (k * 32 >> 4), 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (lane == 0) mbarrier_arrive(barriers_.scored(tile));
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(barriers_.rope_empty());
  }

 private:
  template <int kPair>
  __device__ __forceinline__ void add_pair() {
    mbarrier_wait(barriers_.full(position_.slot), position_.parity);
    const uint64_t keys = matrix_descriptor(position_.address(base_), 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t key = keys + ((i * kSlabBytes + k * 32) >> 4);
        const int accumulate = kPair > 0 || i > 0 || k > 0;
        if constexpr (kPair < L::kHeldPairs) {
          Wgmma<T>::scores(s, held_[2 * kPair + i][k], key, accumulate);
        } else {
          const uint32_t slab = L::kQuery + (1 + 2 * (kPair - L::kHeldPairs) + i) * kSlabBytes;
          Wgmma<T>::scores(s, matrix_descriptor(base_ + slab, 16, 1024) + (k * 32 >> 4), key, accumulate);
        }
      }
    }
    position_.advance(1);
  }

  const RingBarriers<L>& barriers_;
  uint32_t base_;
  RingPosition<L> position_;
  uint32_t held_[2 * L::kHeldPairs][4][4];
};

template <typename T, typename L>
__device__ __forceinline__ void score_tiles(const Params& params, const CUtensorMap* query_map, Schedule& schedule,
                                            const RingBarriers<L>& barriers, char* smem, uint32_t base, int cta, int group,
                                            int m_tile, int thread) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int row = warp * 16 + lane / 4;  // and row + 8
  Task* tasks = reinterpret_cast<Task*>(smem + L::kTasks);
  const Visibility visibility(params, m_tile * kTileRows + row, lane);

  RingScores<T, L> scores(barriers, base);
  Work work;
  uint32_t tile = 0;
  uint32_t item = 0;
  while (schedule.next(work)) {
    const int slot = group == work.head_group;  // of this CTA's partial results
    const int head = work.head_group * params.m_tiles + m_tile;
    LazySoftmax softmax;
    if (L::kUnpacks && warp == 0) scores.request_query(params, query_map, work.item, m_tile, item, lane);
    scores.load_query(warp, lane, item);
    MLA_TRACE(3);
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      MLA_TRACE(4);
      scores.compute(tile, lane);
      if (t == work.last - 1 && lane == 0) mbarrier_arrive(barriers.query_empty());
      MLA_TRACE(5);

      visibility.mask(params, scores.s, work.length - t * kTileTokens);
      float alpha[2];
      uint32_t p[2][8];
      softmax.weigh<T>(scores.s, params.scale_log2, alpha, p);
      MLA_TRACE(6);

      mbarrier_wait(barriers.read(tile), pair_parity(tile) ^ 1);
      store_weights(base + L::kWeights + (tile & 1) * kSlabBytes, warp, p);
      if ((lane & 3) == 0) {
        float* factor = reinterpret_cast<float*>(smem + L::kAlpha) + (tile & 1) * 64 + row;
        factor[0] = alpha[0];
        factor[8] = alpha[1];
      }
      if (t == work.first && thread == 0) {
        const int tail = min(kTileTokens, work.length - (work.last - 1) * kTileTokens);
        tasks[item & 1] = {work.last - work.first, tail, work.item, work.parts, head, slot, schedule.at_end()};
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.written(tile));
      MLA_TRACE(7);
    }

    float inverse[2];
    softmax.finish(inverse);
    if ((lane & 3) == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        reinterpret_cast<float*>(smem + L::kInverse)[(item & 1) * 64 + row + 8 * i] = inverse[i];
        if (work.parts == 1) {
          store_lse(params, row_table<L>(smem), work.item, row + 8 * i, softmax.maximum[i], softmax.sum[i]);
        } else {
          params.stats[(2 * cta + slot) * 64 + row + 8 * i] = make_float2(softmax.maximum[i], softmax.sum[i]);
        }
      }
    }
    if (work.parts > 1 && thread == 0) {
      reinterpret_cast<Split*>(smem + L::kSplits)[slot] = {work.item, head, work.parts, group - work.head_group};
    }
    __syncwarp();
    if (lane == 0) {
      if (work.parts > 1) add_release(params.counted + head, 1);
      mbarrier_arrive(barriers.inverted(item));
    }
    MLA_TRACE(9);
    ++item;
  }
  mbarrier_wait(barriers.read(tile), pair_parity(tile) ^ 1);
  if (thread == 0) tasks[item & 1].tiles = 0;
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barriers.written(tile));
  MLA_TRACE(10);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_SCORES_CUH_
