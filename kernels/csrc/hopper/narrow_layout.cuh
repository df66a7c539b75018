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

// The ring's slots hold a step each, what a team takes at once. A cluster of kCtas needs room for what others send.
template <int kStepBytesOf, int kCtas = 1>
struct NarrowLayout {
  static constexpr int kRows = kNarrowRows;
  static constexpr int kCluster = kCtas;
  static constexpr int kThreads = kTeams * 128 + 128;  // and a warp for the cache, one for the queries, two idle
  static constexpr int kStepBytes = kStepBytesOf;
  static constexpr int kRawSlots = kCtas > 1 ? 3 : 4;
  // A team waits for each phase of its barriers, or it could not tell one from the next but one. With an odd number of slots
  // the teams take turns with a slot, so that it needs a barrier for each.
  static constexpr int kFull = kRawSlots % kTeams == 0 ? kRawSlots : kTeams * kRawSlots;
  static constexpr int kQuerySlabBytes = kRows * kColumns * 2;
  static constexpr int kExchangeBytes = 4 * 8 * 32 * 16;  // of a team: float4 [4 warps, up to 8, 32 lanes]
  static constexpr int kQuery = 0;
  static constexpr int kExchange = kQuery + kSlabs * kQuerySlabBytes;
  static constexpr int kRing = kExchange + kTeams * kExchangeBytes;
  static constexpr int kTotals = kRing + kRawSlots * kStepBytes;  // float2 [teams, 16]: maximum and sum of a row
  // From each CTA of the cluster: its sums of this one's columns, float4 [kUnits, 32], and its rows' totals, float2 [16].
  static constexpr int kUnits = 64 / kCtas;  // of 8 columns
  static constexpr int kSentSums = kTotals + kTeams * kRows * 8;
  static constexpr int kSentTotals = kSentSums + (kCtas > 1 ? kCtas * kUnits * 512 : 0);
  static constexpr int kSentBytes = kCtas * (kUnits * 512 + kRows * 8);
  static constexpr int kOutRows = kSentSums + (kCtas > 1 ? kSentBytes : 0);  // RowTable
  static constexpr int kLseRows = kOutRows + 64 * 8;
  static constexpr int kSplits = kLseRows + 64 * 4;
  static constexpr int kBarriers = kSplits + 32;
  static constexpr int kBytes = kBarriers + (2 + kFull + kRawSlots + kTeams + 2) * 8;
  static constexpr int kRequest = kBytes + 1024;
  static_assert(kRequest <= 232448, "more shared memory than a CTA can have");
  static_assert(kRing % 1024 == 0, "swizzled slabs must be aligned to the swizzle's period");
};

template <typename L>
struct NarrowBarriers : Barriers<L> {
  __device__ __forceinline__ explicit NarrowBarriers(uint32_t base) : Barriers<L>{base} {}
  // Of a step of the CTA's stream: its slot is full, with `phase` to wait for, and is empty again.
  __device__ __forceinline__ uint32_t full(uint32_t step) const { return this->raw_full(step % L::kFull); }
  static __device__ __forceinline__ uint32_t full_phase(uint32_t step) { return step / L::kFull & 1; }
  __device__ __forceinline__ uint32_t empty(uint32_t slot) const { return this->raw_full(L::kFull + slot); }
  __device__ __forceinline__ uint32_t exchange_empty(int team) const { return empty(L::kRawSlots + team); }
  // Of a cluster: what its CTAs sent to this one is there; all have read what this one sent.
  __device__ __forceinline__ uint32_t sent() const { return exchange_empty(kTeams); }
  __device__ __forceinline__ uint32_t received() const { return sent() + 8; }

  __device__ __forceinline__ void init() const {
    mbarrier_init(this->query_full(), 1);
    mbarrier_init(this->query_empty(), 4 * kTeams);  // warps
    for (int i = 0; i < L::kFull; ++i) mbarrier_init(full(i), 1);
    for (int slot = 0; slot < L::kRawSlots; ++slot) mbarrier_init(empty(slot), 4);
    for (int team = 0; team < kTeams; ++team) mbarrier_init(exchange_empty(team), 4);
    mbarrier_init(sent(), 1);
    mbarrier_init(received(), 4 * kTeams * L::kCluster);
    mbarrier_init_fence();
    if (L::kCluster > 1) mbarrier_expect(sent(), L::kSentBytes);
  }
};

// All lanes of the warp are done with what the barrier guards.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barrier);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_LAYOUT_CUH_
