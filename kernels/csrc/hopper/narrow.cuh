// The kernel with 16 query rows a CTA: for no more rows, where memory is the limit, and for short batches, where the time
// to begin and to merge is. Operands go from the cache's bytes in shared memory to registers and no further. A team of
// four warps works on a step of 32 or 64 tokens, each warp on 128 latents of all of them, for the scores and for the
// values alike; the only exchange is that of the four warps' shares of the scores. Two teams take steps in turn, and add
// up at an item's end (narrow_teams.cuh). In short batches a cluster of CTAs shares the tiles of an item, or of a part of
// one, and adds up in shared memory (narrow_cluster.cuh); alone, CTAs meet in the workspace (merge.cuh).
#ifndef MLA_HOPPER_NARROW_CUH_
#define MLA_HOPPER_NARROW_CUH_

#include "barriers.cuh"
#include "load.cuh"
#include "merge.cuh"
#include "narrow_16bit.cuh"
#include "narrow_cluster.cuh"
#include "narrow_fp8.cuh"
#include "narrow_layout.cuh"
#include "narrow_softmax.cuh"
#include "narrow_teams.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// Steps of a part of an item; its last tile may have fewer than others.
template <int kStepTokens>
__device__ __forceinline__ int step_count(const Work& work) {
  const int end = min(work.length, work.last * kTileTokens);
  return (end - work.first * kTileTokens + kStepTokens - 1) / kStepTokens;
}

// A part is done: to the output or the workspace.
template <typename Operands>
__device__ __forceinline__ void store_part(const Params& params, const Work& work, char* smem, const Seat& seat, int thread,
                                           const TeamsSum& sum) {
  using L = typename Operands::L;
  const int lane = thread & 31;
  const int block = thread / 32 & 3;
  const int team = thread / 128;
  const int g = lane / 4;
  const RowTable table = row_table<L>(smem);
  const bool states = team == 0 && block == 0 && (lane & 3) == 0;  // stores the rows' statistics
  const int cta = seat.group * params.m_tiles + seat.m_tile;
  const int slot = seat.group == work.head_group;
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    inverse[i] = sum.total[i] == 0.f ? 0.f : Operands::kUnit * __frcp_rn(sum.total[i]);
    if (states) {
      if (work.parts == 1) {
        store_lse(params, table, work.item, g + 8 * i, sum.maximum[i], sum.total[i]);
      } else {
        params.stats[(2 * cta + slot) * 64 + g + 8 * i] = make_float2(sum.maximum[i], sum.total[i]);
      }
    }
  }
  if (work.parts == 1) {
    Operands::store(RowPair<typename Operands::T>(params, table, work.item, g), block * 128 + team * 64, lane, sum.value, inverse);
  } else {
    float value[32];
#pragma unroll
    for (int e = 0; e < 32; ++e) value[e] = sum.value[e / 4][e % 4] * Operands::kUnit;
    store_partial<8>(params, 2 * cta + slot, 2 * block + team, lane, value);
    if (thread == 0) {
      reinterpret_cast<Split*>(smem + L::kSplits)[slot] = {work.item, work.head_group * params.m_tiles + seat.m_tile, work.parts,
                                                             seat.group - work.head_group};
    }
    announce_part(params, work.head_group * params.m_tiles + seat.m_tile, team, thread & 127);
  }
}

// Eight warps: every part of the group's piece, to the output or the workspace.
template <typename Operands, int kCtas>
__device__ __forceinline__ void consume_steps(const Params& params, Schedule& schedule,
                                              const NarrowBarriers<NarrowLayout<Operands::kStepBytes, kCtas>>& barriers,
                                              char* smem, uint32_t base, const Seat& seat, int thread) {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  constexpr int kStepTokens = Operands::kStepTokens;
  constexpr int kGroups = kStepTokens / 8;
  const int lane = thread & 31;
  const int block = thread / 32 & 3;
  const int team = thread / 128;
  const int g = lane / 4, c = lane & 3;
  float4* shares = reinterpret_cast<float4*>(smem + L::kExchange + team * L::kExchangeBytes) + lane;
  int hidden[2];  // tokens that rows g and g + 8 do not see, counted from the end
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    hidden[i] = params.causal ? max(0, params.s_q - 1 - (seat.m_tile * L::kRows + g + 8 * i) / params.h_q) : 0;
  }
  const int always_seen = params.causal ? params.s_q - 1 : 0;

  Work work;
  uint32_t step = 0;   // of the CTA's stream, at the item's beginning
  uint32_t items = 0;
  uint32_t uses = 0;   // of this team's exchange buffer
  while (schedule.next(work)) {
    take_share<kCtas>(work);
    if (kCtas > 1 && items > 0) {
      ClusterMerge<Operands, kCtas>(params, barriers, smem, base, seat, thread).received();
    }
    typename Operands::Query query;
    mbarrier_wait(barriers.query_full(), items & 1);
    MLA_TRACE(3);
    query.load(smem + L::kQuery, block, lane);
    warp_arrive(barriers.query_empty(), lane);

    float o[2][8][4];
    RowPairSoftmax softmax;
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i & 1][i / 2 & 7][i / 16 & 3] = 0.f;
    const int steps = step_count<kStepTokens>(work);
#pragma unroll 1
    for (int i = (step ^ team) & 1; i < steps; i += kTeams) {
      const uint32_t slot = (step + i) % L::kRawSlots;
      const uint32_t tokens = base + L::kRing + slot * L::kStepBytes;
      const int used = work.length - work.first * kTileTokens - i * kStepTokens;
      mbarrier_wait(barriers.full(step + i), barriers.full_phase(step + i));
      float s[kGroups][4];
      Operands operands;
      MLA_TRACE(4);
      operands.scores(s, query, tokens, block, lane, used);
      mbarrier_wait(barriers.exchange_empty(team), (uses & 1) ^ 1);
      ++uses;
      add_shares(shares, s, block, team);
      warp_arrive(barriers.exchange_empty(team), lane);

      if (params.negative) {
#pragma unroll
        for (int e = 0; e < 4 * kGroups; ++e) s[e / 4][e % 4] = -s[e / 4][e % 4];
      }
      float alpha[2];
      uint32_t weight[kGroups / 2][4];
      if (used < kStepTokens + always_seen) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int limit = used - hidden[i] - 2 * c - 8 * j;
            if (limit <= 0) s[j][2 * i] = -INFINITY;
            if (limit <= 1) s[j][2 * i + 1] = -INFINITY;
          }
        }
      }
      softmax.add(s, operands, params.scale_log2, weight, alpha);
      if (!__all_sync(kAllLanes, alpha[0] == 1.f && alpha[1] == 1.f)) {
#pragma unroll
        for (int e = 0; e < 64; ++e) o[e & 1][e / 2 & 7][e / 16 & 3] *= alpha[e / 32 & 1];
      }
      operands.values(o, weight, tokens, block, team, lane, used);
      warp_arrive(barriers.empty(slot), lane);
    }
    step += steps;
    MLA_TRACE(6);

    softmax.add_lanes();
    mbarrier_wait(barriers.exchange_empty(team), (uses & 1) ^ 1);
    ++uses;
    const TeamsSum sum = add_teams<L>(smem, thread, o, softmax);
    warp_arrive(barriers.exchange_empty(1 - team), lane);
    MLA_TRACE(7);
    if (kCtas == 1) {
      store_part<Operands>(params, work, smem, seat, thread, sum);
    } else {
      const ClusterMerge<Operands, kCtas> merge(params, barriers, smem, base, seat, thread);
      if (items == 0) {
        cluster_wait();  // all have their barriers
      } else {
        mbarrier_wait_cluster(barriers.received(), (items & 1) ^ 1);
      }
      merge.send(sum);
      merge.add(work, items & 1);
    }
    ++items;
  }
}

// One warp: the steps of the group's whole stream into the ring.
template <typename Operands, int kCtas>
__device__ __forceinline__ void load_steps(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                           const NarrowBarriers<NarrowLayout<Operands::kStepBytes, kCtas>>& barriers, uint32_t ring,
                                           int lane) {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  const uint64_t policy = schedule.cache_policy();
  Work work;
  uint32_t step = 0;
  while (schedule.next(work)) {
    take_share<kCtas>(work);
    const int32_t* pages = params.block_table + work.item * params.block_table_stride + work.first;
    const int steps = step_count<Operands::kStepTokens>(work);
    constexpr int kSteps = kTileTokens / Operands::kStepTokens;  // of a tile
    int mine = 0;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, ++step) {
      const int tile = i / kSteps;
      if (i % (32 * kSteps) == 0) mine = work.first + tile + lane < work.last ? pages[tile + lane] : 0;
      const int page = __shfl_sync(kAllLanes, mine, tile & 31);
      const uint32_t slot = step % L::kRawSlots;
      mbarrier_wait(barriers.empty(slot), (step / L::kRawSlots & 1) ^ 1);
      Operands::load(params, map, ring + slot * L::kStepBytes, barriers.full(step), page, i % kSteps, policy, lane);
      __syncwarp();
    }
  }
}

// A cluster of kCtas CTAs is a group of the schedule. With clusters of 1 groups merge through the workspace, and the launch
// must be cooperative.
template <typename Operands, int kCtas>
__global__ void __launch_bounds__(Operands::L::kThreads, 1)
mla_decode_narrow_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                         const __grid_constant__ CUtensorMap cache_map) {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  using T = typename Operands::T;
  extern __shared__ char dynamic_smem[];
  char* smem = dynamic_smem;
  const uint32_t base = align_shared(smem);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const NarrowBarriers<L> barriers(base + L::kBarriers);
  MLA_TRACE(0);
  const Schedule::FirstLengths first_lengths(params, lane);
  if (warp == 0) {
    if (lane == 0) barriers.init();
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, blockIdx.x / kCtas % params.m_tiles, threadIdx.x - 32);
  } else if (warp == 8) {
    prefetch_block_table(params, lane);
  } else if (warp == 9) {
    if (lane == 0) prefetch_tensor_map(&query_map);
    if (Operands::kStepTokens < kTileTokens && lane == 1) prefetch_tensor_map(&cache_map);
  }
  __syncthreads();
  if (kCtas > 1) cluster_arrive();
  MLA_TRACE(1);

  const int cluster = blockIdx.x / kCtas;
  const int group = cluster / params.m_tiles;
  const Seat seat = {group, cluster - group * params.m_tiles};
  Schedule schedule(params, group, lane, first_lengths);
  MLA_TRACE(2);
  if (warp >= 8) {
    shrink_registers<kProducerRegisters>();
    if (warp == 8) {
      load_steps<Operands, kCtas>(params, &cache_map, schedule, barriers, base + L::kRing, lane);
    } else if (warp == 9) {
      load_queries(params, &query_map, schedule, barriers, base + L::kQuery, seat.m_tile, lane);
    }
  } else {
    grow_registers<kTeamRegisters>();
    const int thread = threadIdx.x;
    consume_steps<Operands, kCtas>(params, schedule, barriers, smem, base, seat, thread);
    const RowTable table = row_table<L>(smem);
    if (schedule.has_empty_items) {
#pragma unroll 1
      for (int item = group * kCtas + (kCtas > 1 ? cluster_rank() : 0); item < params.batch; item += params.groups * kCtas) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, table, item, thread);
      }
    }
    if (kCtas > 1) return;
    named_sync(kMergeBarrier, kMergeThreads);  // both teams are done with the ring
#pragma unroll 1
    for (int slot = 0; slot < 2; ++slot) {
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) {
        merge<T, typename Operands::Order, 2>(params, table, split, thread, reinterpret_cast<float*>(smem + L::kRing));
      }
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CUH_
