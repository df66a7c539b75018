// Shared memory and barriers of the kernel for at most 16 query rows.
#ifndef MLA_HOPPER_NARROW_LAYOUT_CUH_
#define MLA_HOPPER_NARROW_LAYOUT_CUH_

#include "barriers.cuh"

namespace mla_hopper {

constexpr int kTeams = 2;
constexpr int kMostClusters = 16;  // that share an item
constexpr int kBothTeams = 1;    // named barriers beside those of barriers.cuh
constexpr int kTeamBarrier = 2;  // and 3

// Registers of a thread: what the launch gives all 384, what the two teams take, what the other four warps keep. The teams
// can have no more than the others give back, or they would wait for it for ever.
constexpr int kLaunchRegisters = 65536 / (kTeams * 128 + 128) / 8 * 8;
constexpr int kTeamRegisters = 232;
constexpr int kProducerRegisters = 40;
static_assert(kTeams * (kTeamRegisters - kLaunchRegisters) <= kLaunchRegisters - kProducerRegisters,
              "the teams ask for registers that nobody gives back");

// The ring's slots hold a step each, what a team takes at once: as many as there is room for, which clusters of kCtas need
// for what others send, too.
template <int kStepBytesOf, int kCtas = 1>
struct NarrowLayout {
  static constexpr int kRows = kNarrowRows;
  static constexpr int kTableRows = kCtas > 1 ? kRows : kTileRows;  // of RowTable
  static constexpr int kThreads = kTeams * 128 + 128;  // and a warp for the cache, one for the queries, two idle
  static constexpr int kStepBytes = kStepBytesOf;
  static constexpr int kQuerySlabBytes = kRows * kColumns * 2;
  static constexpr int kExchangeBytes = 4 * 8 * 32 * 16;  // of a team: float4 [4 warps, up to 8, 32 lanes]
  static constexpr int kQuery = 0;
  static constexpr int kExchange = kQuery + kSlabs * kQuerySlabBytes;
  static constexpr int kTotals = kExchange + kTeams * kExchangeBytes;  // float2 [teams, 16]: maximum and sum of a row
  static constexpr int kSplits = kTotals + kTeams * kRows * 8;
  static constexpr int kOutRows = kSplits + 32;  // RowTable
  static constexpr int kLseRows = kOutRows + kTableRows * 8;
  // From each CTA of the cluster: its sums of this one's columns in 16 bits, uint4 [kUnits / 2, 32], of which each sending
  // warp has up to 8 units, its rows' totals, float2 [16], and the factors of each sender's rows, float2 [kSenders, 8].
  static constexpr int kUnits = 64 / kCtas;  // of 8 columns
  static constexpr int kSenders = kUnits < 8 ? 1 : kUnits / 8;
  static_assert(kUnits % 2 == 0, "two units are sent at once");
  static constexpr int kSentSumBytes = kCtas > 1 ? kCtas * kUnits * 256 : 0;
  static constexpr int kSentTotalBytes = kCtas > 1 ? kCtas * (kRows * 8 + kSenders * kRows * 4) : 0;
  static constexpr int kSentSums = kLseRows + kTableRows * 4;
  static constexpr int kSentTotals = kSentSums + kSentSumBytes;
  static constexpr int kSentFactors = kSentTotals + (kCtas > 1 ? kCtas * kRows * 8 : 0);
  static constexpr int kWeights = (kSentTotals + kSentTotalBytes + 7) / 8 * 8;  // float2 [CTAs or clusters, 8]
  static constexpr int kBarriers = kWeights + (kCtas > 1 ? kMostClusters * kRows * 4 : 0);
  static constexpr int kMostBarriers = 2 + 8 + 4 + kTeams + 2;
  static constexpr int kRing = (kBarriers + kMostBarriers * 8 + 1023) / 1024 * 1024;
  static constexpr int kRawSlots = kRing + 4 * kStepBytes <= kMostShared ? 4 : 3;
  // A team waits for each phase of its barriers, or it could not tell one from the next but one. With an odd number of slots
  // the teams take turns with a slot, so that it needs a barrier for each.
  static constexpr int kFull = kRawSlots % kTeams == 0 ? kRawSlots : kTeams * kRawSlots;
  static constexpr int kBytes = kRing + kRawSlots * kStepBytes;
  static_assert(kBytes <= kMostShared, "more shared memory than a CTA can have");
  static_assert(kSentSums % 16 == 0, "what is sent in 16 bytes must be aligned to them");
};

template <typename L>
struct NarrowBarriers : Barriers<L> {
  __device__ __forceinline__ explicit NarrowBarriers(uint32_t base) : Barriers<L>{base} {}
  // Of a step of the CTA's stream: its slot is full, with `phase` to wait for, and is empty again.
  __device__ __forceinline__ uint32_t full(uint32_t step) const { return this->raw_full(step % L::kFull); }
  static __device__ __forceinline__ uint32_t full_phase(uint32_t step) { return step / L::kFull & 1; }
  __device__ __forceinline__ uint32_t empty(uint32_t slot) const { return this->raw_full(L::kFull + slot); }
  __device__ __forceinline__ uint32_t exchange_empty(int team) const { return empty(L::kRawSlots + team); }
  // Of a cluster: what its CTAs sent to this one is there.
  __device__ __forceinline__ uint32_t totals_sent() const { return exchange_empty(kTeams); }
  __device__ __forceinline__ uint32_t sums_sent() const { return totals_sent() + 8; }

  __device__ __forceinline__ void init() const {
    mbarrier_init(this->query_full(), 1);
    mbarrier_init(this->query_empty(), 4 * kTeams);  // warps
    for (int i = 0; i < L::kFull; ++i) mbarrier_init(full(i), 1);
    for (int slot = 0; slot < L::kRawSlots; ++slot) mbarrier_init(empty(slot), 4);
    for (int team = 0; team < kTeams; ++team) mbarrier_init(exchange_empty(team), 4);
    mbarrier_init(totals_sent(), 1);
    mbarrier_init(sums_sent(), 1);
    mbarrier_init_fence();
    if (L::kSentSumBytes > 0) {
      mbarrier_expect(totals_sent(), L::kSentTotalBytes);
      mbarrier_expect(sums_sent(), L::kSentSumBytes);
    }
  }
};

// All lanes of the warp are done with what the barrier guards.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barrier);
}

// A step's tokens into its slot of the ring. One warp.
template <typename Operands, typename L>
__device__ __forceinline__ void load_step(const Params& params, const CUtensorMap* map, const NarrowBarriers<L>& barriers,
                                          uint32_t ring, uint32_t step, int page, int part, uint64_t policy, int lane) {
  const uint32_t slot = step % L::kRawSlots;
  mbarrier_wait(barriers.empty(slot), (step / L::kRawSlots & 1) ^ 1);
  Operands::load(params, map, ring + slot * L::kStepBytes, barriers.full(step), page, part, policy, lane);
  __syncwarp();
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_LAYOUT_CUH_
