// A team's steps through its share of an item, in the kernels for few query rows: scores, softmax, values.
#ifndef MLA_HOPPER_NARROW_STEPS_CUH_
#define MLA_HOPPER_NARROW_STEPS_CUH_

#include "narrow_layout.cuh"
#include "narrow_softmax.cuh"
#include "narrow_teams.cuh"

namespace mla_hopper {

// A team's steps through an item.
struct Steps {
  uint32_t first;  // its number among the steps of the CTA, of which the team takes every kTeams-th
  int used;        // tokens from its beginning to the item's end
  int stride;      // tokens from one to the next
  int rest;        // tokens of the item that are others' work, at its end
};

// One thread of a team.
template <typename Operands, typename L>
class Team {
  static constexpr int kStepTokens = Operands::kStepTokens;
  static constexpr int kGroups = kStepTokens / 8;

 public:
  __device__ __forceinline__ Team(const Params& params, const NarrowBarriers<L>& barriers, char* smem, uint32_t base, int m_tile,
                                  int thread)
      : params_(params), barriers_(barriers), smem_(smem), base_(base), thread_(thread) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      hidden_[i] = params.causal ? max(0, params.s_q - 1 - (m_tile * L::kRows + lane() / 4 + 8 * i) / params.h_q) : 0;
    }
  }

  // Goes through `steps`, and adds up with the other team; values times `unit`.
  __device__ __forceinline__ TeamsSum run(const typename Operands::Query& query, Steps steps, float unit = 1.f) {
    float o[2][8][4];
    RowPairSoftmax softmax;
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i & 1][i / 2 & 7][i / 16 & 3] = 0.f;
    uint32_t step = steps.first;
#pragma unroll 1
    for (; steps.used > steps.rest; steps.used -= steps.stride, step += kTeams) take(query, step, steps.used, softmax, o);
    MLA_TRACE_IN(params_, 6);
    softmax.add_lanes();
    await_exchange();
    const TeamsSum sum = add_teams<L>(smem_, thread_, o, softmax, unit);
    warp_arrive(barriers_.exchange_empty(1 - team()), lane());
    MLA_TRACE_IN(params_, 7);
    return sum;
  }

 private:
  __device__ __forceinline__ int lane() const { return thread_ & 31; }
  __device__ __forceinline__ int block() const { return thread_ / 32 & 3; }
  __device__ __forceinline__ int team() const { return thread_ / 128; }

  // Tokens from the item's end on that some row may not see.
  __device__ __forceinline__ int always_seen() const { return params_.causal ? params_.s_q - 1 : 0; }

  // The team's exchange buffer is free.
  __device__ __forceinline__ void await_exchange() {
    mbarrier_wait(barriers_.exchange_empty(team()), (uses_ & 1) ^ 1);
    ++uses_;
  }

  // One step: the next of the team's in the ring, `used` tokens before the item's end.
  __device__ __forceinline__ void take(const typename Operands::Query& query, uint32_t step, int used, RowPairSoftmax& softmax,
                                       float (&o)[2][8][4]) {
    const uint32_t slot = step % L::kRawSlots;
    const uint32_t tokens = base_ + L::kRing + slot * L::kStepBytes;
    float4* shares = reinterpret_cast<float4*>(smem_ + L::kExchange + team() * L::kExchangeBytes) + lane();
    mbarrier_wait(barriers_.full(step), barriers_.full_phase(step));
    float s[kGroups][4];
    Operands operands;
    MLA_TRACE_IN(params_, 4);
    operands.scores(s, query, tokens, block(), lane(), used);
    await_exchange();
    add_shares(shares, s, block(), team());
    warp_arrive(barriers_.exchange_empty(team()), lane());

    if (params_.negative) {
#pragma unroll
      for (int e = 0; e < 4 * kGroups; ++e) s[e / 4][e % 4] = -s[e / 4][e % 4];
    }
    if (used < kStepTokens + always_seen()) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int limit = used - hidden_[i] - 2 * (lane() & 3) - 8 * j;
          if (limit <= 0) s[j][2 * i] = -INFINITY;
          if (limit <= 1) s[j][2 * i + 1] = -INFINITY;
        }
      }
    }
    float alpha[2];
    uint32_t weight[kGroups / 2][4];
    softmax.add(s, operands, params_.scale_log2, weight, alpha);
    if (!__all_sync(kAllLanes, alpha[0] == 1.f && alpha[1] == 1.f)) {
#pragma unroll
      for (int e = 0; e < 64; ++e) o[e & 1][e / 2 & 7][e / 16 & 3] *= alpha[e / 32 & 1];
    }
    operands.values(o, weight, tokens, block(), team(), lane(), used);
    warp_arrive(barriers_.empty(slot), lane());
  }

  const Params& params_;
  const NarrowBarriers<L>& barriers_;
  char* smem_;
  uint32_t base_;
  int thread_;
  int hidden_[2];  // tokens that rows g and g + 8 do not see, counted from the end
  uint32_t uses_ = 0;  // of the team's exchange buffer
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_STEPS_CUH_
