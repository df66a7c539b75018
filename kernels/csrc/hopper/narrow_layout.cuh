// Shared memory and barriers of the kernel for at most 16 query rows.
#ifndef MLA_HOPPER_NARROW_LAYOUT_CUH_
#define MLA_HOPPER_NARROW_LAYOUT_CUH_

#include "barriers.cuh"

namespace mla_hopper {

constexpr int kTeams = 2;
constexpr int kBothTeams = 1;    // named barriers beside those of barriers.cuh
constexpr int kTeamBarrier = 2;  // and 3

// Registers of a thread: what the launch gives all 384, what the two teams take, what the other four warps keep. The teams
// can have no more than the others give back, or they would wait for it for ever.
constexpr int kLaunchRegisters = 65536 / (kTeams * 128 + 128) / 8 * 8;
constexpr int kTeamRegisters = 232;
constexpr int kProducerRegisters = 40;
static_assert(kTeams * (kTeamRegisters - kLaunchRegisters) <= kLaunchRegisters - kProducerRegisters,
              "the teams ask for registers that nobody gives back");

// The ring's slots hold a step each, what a team takes at once.
template <int kStepBytesOf>
struct NarrowLayout {
  static constexpr int kRows = kNarrowRows;
  static constexpr int kThreads = kTeams * 128 + 128;  // and a warp for the cache, one for the queries, two idle
  static constexpr int kStepBytes = kStepBytesOf;
  static constexpr int kRawSlots = 4;
  static constexpr int kQuerySlabBytes = kRows * kColumns * 2;
  static constexpr int kExchangeBytes = 4 * 8 * 32 * 16;  // of a team: float4 [4 warps, up to 8, 32 lanes]
  static constexpr int kQuery = 0;
  static constexpr int kExchange = kQuery + kSlabs * kQuerySlabBytes;
  static constexpr int kRing = kExchange + kTeams * kExchangeBytes;
  static constexpr int kTotals = kRing + kRawSlots * kStepBytes;  // float2 [teams, 16]: maximum and sum of a row
  static constexpr int kOutRows = kTotals + kTeams * kRows * 8;   // RowTable
  static constexpr int kLseRows = kOutRows + 64 * 8;
  static constexpr int kSplits = kLseRows + 64 * 4;
  static constexpr int kBarriers = kSplits + 32;
  static constexpr int kBytes = kBarriers + (2 + 2 * kRawSlots + kTeams) * 8;
  static constexpr int kRequest = kBytes + 1024;
  static_assert(kRequest <= 232448, "more shared memory than a CTA can have");
  static_assert(kRing % 1024 == 0, "swizzled slabs must be aligned to the swizzle's period");
};

template <typename L>
struct NarrowBarriers : Barriers<L> {
  __device__ __forceinline__ explicit NarrowBarriers(uint32_t base) : Barriers<L>{base} {}
  __device__ __forceinline__ uint32_t full(uint32_t slot) const { return this->raw_full(slot); }
  __device__ __forceinline__ uint32_t empty(uint32_t slot) const { return this->raw_full(L::kRawSlots + slot); }
  __device__ __forceinline__ uint32_t exchange_empty(int team) const { return empty(L::kRawSlots + team); }

  __device__ __forceinline__ void init() const {
    mbarrier_init(this->query_full(), 1);
    mbarrier_init(this->query_empty(), 4 * kTeams);  // warps
    for (int slot = 0; slot < L::kRawSlots; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), 4);
    }
    for (int team = 0; team < kTeams; ++team) mbarrier_init(exchange_empty(team), 4);
    mbarrier_init_fence();
  }
};

// All lanes of the warp are done with what the barrier guards.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barrier);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_LAYOUT_CUH_
