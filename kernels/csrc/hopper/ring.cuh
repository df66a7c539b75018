// Shared memory of the kernel for more than 16 query rows (ring_kernel.cuh): a ring of pieces, its barriers, and the order
// in which pieces pass.
//
// A piece is a pair of [64 rows, 64 columns] slabs. An item sends its first query slabs, which warpgroup 0 moves to
// registers, and then four pieces a tile: two for each half of the output columns, in turn, since both halves are done
// with their pieces at the same time. The rope slab, read for the scores only and last, has a place of its own.
#ifndef MLA_HOPPER_RING_CUH_
#define MLA_HOPPER_RING_CUH_

#include "params.cuh"
#include "ptx.cuh"

namespace mla_hopper {

constexpr int kPairBytes = 2 * kSlabBytes;
constexpr int kTilePairs = 4;
constexpr int kMergeSteps = 4;  // in which the parts of a split item come into the ring
__host__ __device__ constexpr int pair_slab(int pair) { return 4 * (pair & 1) + 2 * (pair >> 1); }
__host__ __device__ constexpr int slab_pair(int slab) { return (slab >> 2 & 1) + (slab & 2); }  // the pair that a slab is in

// Byte offsets from a base aligned to 1024, the swizzle's period.
// kHeldPairsOf: pairs of query slabs that live in registers: shared memory's bandwidth is what the tensor cores wait for.
// kSlotsOf: pieces in the ring. kRawSlotsOf: slots for tokens that are yet to be unpacked, 0 for a 16-bit cache.
// Registers a thread, of the 512 that four warpgroups share: the compiler keeps the first 24 from wgmma's operands.
template <int kHeldPairsOf, int kSlotsOf, int kRawSlotsOf, int kScoreRegistersOf>
struct RingShape {
  static constexpr int kRows = kTileRows;
  static constexpr int kThreads = 512;  // warpgroups: scores, two of values, producers
  static constexpr int kLaunchRegisters = 128;  // that a thread has at first
  static constexpr int kHeldPairs = kHeldPairsOf;
  static constexpr int kSlots = kSlotsOf;
  static constexpr int kRawSlots = kRawSlotsOf;
  static constexpr bool kUnpacks = kRawSlots > 0;
  static constexpr int kFillers = kUnpacks ? 4 : 1;  // who fill a place: unpacking warps, or the copy engine
  static constexpr int kScoreRegisters = kScoreRegistersOf;  // 32 scores, 32 of each pair of the query
  static constexpr int kValueRegisters = 160;                // 128 of the output
  static constexpr int kProducerRegisters = 512 - kScoreRegisters - 2 * kValueRegisters;  // more would never be granted
  static constexpr int kQuerySlabs = kSlabs - 2 * kHeldPairs;    // in shared memory: rope, then the pairs not held
  static constexpr int kQuery = 0;
  static constexpr int kRope = kQuery + kQuerySlabs * kSlabBytes;
  static constexpr int kCache = kRope + kSlabBytes;              // the ring
  static constexpr int kRaw = kCache + kSlots * kPairBytes;
  // Softmax weights P of even and odd tiles, a slab each.
  static constexpr int kWeights = (kRaw + kRawSlots * kRawBytes + 1023) / 1024 * 1024;
  static constexpr int kAlpha = kWeights + 2 * kSlabBytes;       // float[2][64]: their factors of the running output
  static constexpr int kInverse = kAlpha + 2 * 64 * 4;           // float[2][64]: 1 / softmax denominator, by item
  static constexpr int kOutRows = kInverse + 2 * 64 * 4;         // RowTable
  static constexpr int kLseRows = kOutRows + 64 * 8;
  static constexpr int kSplits = kLseRows + 64 * 4;              // Split[2]
  static constexpr int kTasks = kSplits + 32;                    // Task[2], by item
  static constexpr int kBarriers = kTasks + 64;
  static constexpr int kBytes = kBarriers + (2 * kSlots + 12 + kRawSlots + kMergeSteps) * 8;
  static_assert(kBytes <= kMostShared, "more shared memory than a CTA can have");
};

// What the query leaves in shared memory makes the ring longer than the two tiles that are in use at any time.
struct RingLayout : RingShape<3, 2 * kTilePairs + 3, 0, 160> {};
// Unpacking takes registers from the scores, and raw tokens take room from the ring. Its warps would be faster with more of
// both; the value warpgroups have what they need and nothing to spare.
struct RingFp8Layout : RingShape<2, 6, 6, 136> {};

// What the value warpgroups have to know of a Work.
struct Task {
  int tiles;  // 0: no more
  int tail;   // tokens of the last tile
  int item;
  int parts;
  int head;  // CTA of the item's first part
  int slot;  // of this CTA's partial results
  int last;  // of this CTA's tasks
  int unused;
};

// Full and empty say so of a place; its last reader empties it. The others come in pairs, for even and odd tiles or items,
// so that who arrives may be a tile ahead of who waits: scores done, weights written, weights read, inverse written.
template <typename L>
struct RingBarriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t full(int slot) const { return base + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(L::kSlots + slot); }
  __device__ __forceinline__ uint32_t rope_full() const { return full(2 * L::kSlots); }
  __device__ __forceinline__ uint32_t rope_empty() const { return rope_full() + 8; }
  __device__ __forceinline__ uint32_t query_full() const { return rope_full() + 16; }
  __device__ __forceinline__ uint32_t query_empty() const { return rope_full() + 24; }
  __device__ __forceinline__ uint32_t scored(uint32_t tile) const { return rope_full() + 32 + 8 * (tile & 1); }
  __device__ __forceinline__ uint32_t written(uint32_t tile) const { return rope_full() + 48 + 8 * (tile & 1); }
  __device__ __forceinline__ uint32_t read(uint32_t tile) const { return rope_full() + 64 + 8 * (tile & 1); }
  __device__ __forceinline__ uint32_t inverted(uint32_t item) const { return rope_full() + 80 + 8 * (item & 1); }
  __device__ __forceinline__ uint32_t raw_full(int slot) const { return rope_full() + 96 + 8 * slot; }
  __device__ __forceinline__ uint32_t parts_full(int step) const { return raw_full(L::kRawSlots + step); }

  __device__ __forceinline__ void init() const {
    for (int slot = 0; slot < L::kSlots; ++slot) {
      mbarrier_init(full(slot), L::kFillers);
      mbarrier_init(empty(slot), 4);  // warps of the last reader
    }
    mbarrier_init(rope_full(), L::kFillers);
    mbarrier_init(rope_empty(), 4);
    mbarrier_init(query_full(), 1);
    mbarrier_init(query_empty(), 4);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(scored(i), 4);
      mbarrier_init(written(i), 4);
      mbarrier_init(read(i), 8);
      mbarrier_init(inverted(i), 4);
    }
    for (int slot = 0; slot < L::kRawSlots; ++slot) mbarrier_init(raw_full(slot), 1);
    for (int step = 0; step < kMergeSteps; ++step) mbarrier_init(parts_full(step), 1);
    mbarrier_init_fence();
  }
};

// Parity of the phase that belongs to a tile or item in a pair of barriers.
__device__ __forceinline__ uint32_t pair_parity(uint32_t index) { return index >> 1 & 1; }

// A place in the ring: slot, and the parity of its current round.
template <typename L>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ RingPosition ahead(int pieces) const {
    RingPosition next = {slot + pieces, parity};
    if (next.slot >= L::kSlots) {
      next.slot -= L::kSlots;
      next.parity ^= 1;
    }
    return next;
  }
  __device__ __forceinline__ RingPosition behind(int pieces) const {
    RingPosition last = {slot - pieces, parity};
    if (last.slot < 0) {
      last.slot += L::kSlots;
      last.parity ^= 1;
    }
    return last;
  }
  __device__ __forceinline__ void advance(int pieces) { *this = ahead(pieces); }
  __device__ __forceinline__ uint32_t address(uint32_t base) const { return base + L::kCache + slot * kPairBytes; }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_CUH_
