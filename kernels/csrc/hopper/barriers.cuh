// The barriers of a CTA: named ones between warpgroups, mbarriers between producers and consumers.
#ifndef MLA_HOPPER_BARRIERS_CUH_
#define MLA_HOPPER_BARRIERS_CUH_

#include "params.cuh"
#include "ptx.cuh"

namespace mla_hopper {

constexpr int kWeightsReady = 1;   // named barriers; 0 is __syncthreads, 4 the merge's
constexpr int kWeightsFree = 2;
constexpr int kInverseReady = 3;
constexpr int kStoredBarrier = 5;  // and 6: the threads of one value warpgroup

template <typename L>
struct Barriers {
  static constexpr int kStages = L::kStages;
  uint32_t base;
  __device__ __forceinline__ uint32_t full(uint32_t stage, int piece) const { return base + 8 * (stage * kPieces + piece); }
  __device__ __forceinline__ uint32_t empty(uint32_t stage, int piece) const {
    return base + 8 * ((kStages + stage) * kPieces + piece);
  }
  __device__ __forceinline__ uint32_t query_full() const { return base + 8 * 2 * kStages * kPieces; }
  __device__ __forceinline__ uint32_t query_empty() const { return query_full() + 8; }
  __device__ __forceinline__ uint32_t raw_full(uint32_t slot) const { return query_full() + 16 + 8 * slot; }
};

template <typename L>
__device__ __forceinline__ void init_barriers(const Barriers<L>& barriers) {
  for (int stage = 0; stage < L::kStages; ++stage) {
    for (int piece = 0; piece < kPieces; ++piece) {
      mbarrier_init(barriers.full(stage, piece), L::kUnpackers / 32);
      mbarrier_init(barriers.empty(stage, piece), 4);  // warps of the last reader
    }
  }
  mbarrier_init(barriers.query_full(), 1);
  mbarrier_init(barriers.query_empty(), 4);
  for (int slot = 0; slot < L::kRawSlots; ++slot) mbarrier_init(barriers.raw_full(slot), 1);
  mbarrier_init_fence();
}

// Moves the beginning of dynamic shared memory on to the alignment of the swizzle's period; its 32-bit address.
__device__ __forceinline__ uint32_t align_shared(char*& smem) {
  const uint32_t unaligned = shared_address(smem);
  const uint32_t base = (unaligned + 1023) & ~1023u;
  smem += base - unaligned;
  return base;
}

// A consumer warp is done with a piece.
template <typename L>
__device__ __forceinline__ void release(const Barriers<L>& barriers, uint32_t stage, int piece, int lane) {
  if (lane == 0) mbarrier_arrive(barriers.empty(stage, piece));
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_BARRIERS_CUH_
