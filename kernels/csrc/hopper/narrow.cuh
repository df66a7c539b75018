// The kernel with 16 query rows a CTA: for no more rows, where memory is the limit, and for short batches, where the time
// to begin and to merge is. Operands go from the cache's bytes in shared memory to registers and no further. A team of
// four warps works on a step of 32 or 64 tokens, each warp on 128 latents of all of them, for the scores and for the
// values alike; the only exchange is that of the four warps' shares of the scores. Two teams take steps in turn, and add
// up at an item's end.
#ifndef MLA_HOPPER_NARROW_CUH_
#define MLA_HOPPER_NARROW_CUH_

#include "barriers.cuh"
#include "load.cuh"
#include "merge.cuh"
#include "narrow_16bit.cuh"
#include "narrow_fp8.cuh"
#include "narrow_layout.cuh"
#include "narrow_softmax.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// Steps of a part of an item; its last tile may have fewer than others.
template <int kStepTokens>
__device__ __forceinline__ int step_count(const Work& work) {
  const int end = min(work.length, work.last * kTileTokens);
  return (end - work.first * kTileTokens + kStepTokens - 1) / kStepTokens;
}

// A part is done: both teams' sums, o with the statistics in `softmax`, to the output or the workspace. Each team finishes
// half of every warp's latents and gives the other team its share of the other half, through its exchange buffer.
template <typename Operands>
__device__ __forceinline__ void finish_part(const Params& params, const Work& work,
                                            const NarrowBarriers<typename Operands::L>& barriers, char* smem, int group,
                                            int m_tile, int thread, const float (&o)[2][8][4], const RowPairSoftmax& softmax) {
  using L = typename Operands::L;
  using T = typename Operands::T;
  const int lane = thread & 31;
  const int block = thread / 32 & 3;
  const int team = thread / 128;
  const int g = lane / 4, c = lane & 3;
  const RowTable table = row_table<L>(smem);
  float4* exchange = reinterpret_cast<float4*>(smem + L::kExchange);
  float2* totals = reinterpret_cast<float2*>(smem + L::kTotals);
  const bool states = team == 0 && block == 0 && c == 0;  // stores the rows' statistics
  const int cta = group * params.m_tiles + m_tile;
  const int slot = group == work.head_group;
  float kept[8][4];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float other[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      kept[j][e] = team ? o[1][j][e] : o[0][j][e];
      other[e] = team ? o[0][j][e] : o[1][j][e];
    }
    exchange[team * (L::kExchangeBytes / 16) + (block * 8 + j) * 32 + lane] = make_float4(other[0], other[1], other[2], other[3]);
  }
  if (block == 0 && c == 0) {
    totals[team * L::kRows + g] = make_float2(softmax.maximum[0], softmax.sum[0]);
    totals[team * L::kRows + g + 8] = make_float2(softmax.maximum[1], softmax.sum[1]);
  }
  named_sync(kBothTeams, 256);
  float factor[2][2];  // of the row, of its own team's and the other's
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = g + 8 * i;
    // All warps of a team have the same statistics. Who reads the other team's says so at exchange_empty.
    const float2 mine = make_float2(softmax.maximum[i], softmax.sum[i]);
    const float2 other = totals[(1 - team) * L::kRows + row];
    const float2 a = team ? other : mine, b = team ? mine : other;
    const float largest = fmaxf(a.x, b.x);
    const float reference = largest == -INFINITY ? 0.f : largest;
    const float first = exp2_approximate(a.x - reference);
    const float second = exp2_approximate(b.x - reference);
    const float total = a.y * first + b.y * second;
    inverse[i] = total == 0.f ? 0.f : Operands::kUnit * __frcp_rn(total);
    factor[i][0] = team ? second : first;
    factor[i][1] = team ? first : second;
    if (states) {
      if (work.parts == 1) {
        store_lse(params, table, work.item, row, largest, total);
      } else {
        params.stats[(2 * cta + slot) * 64 + row] = make_float2(largest, total);
      }
    }
  }
  const float4* taken = exchange + (1 - team) * (L::kExchangeBytes / 16) + block * 256 + lane;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 other = taken[j * 32];
    kept[j][0] = kept[j][0] * factor[0][0] + other.x * factor[0][1];
    kept[j][1] = kept[j][1] * factor[0][0] + other.y * factor[0][1];
    kept[j][2] = kept[j][2] * factor[1][0] + other.z * factor[1][1];
    kept[j][3] = kept[j][3] * factor[1][0] + other.w * factor[1][1];
  }
  warp_arrive(barriers.exchange_empty(1 - team), lane);
  if (work.parts == 1) {
    Operands::store(RowPair<T>(params, table, work.item, g), block * 128 + team * 64, lane, kept, inverse);
  } else {
    float4* part = params.partial + (2 * cta + slot) * slot_elements(params) + (4 * block + 2 * team) * 128 + lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      part[j * 32] = make_float4(kept[j][0] * Operands::kUnit, kept[j][1] * Operands::kUnit, kept[j][2] * Operands::kUnit,
                                 kept[j][3] * Operands::kUnit);
    }
    if (thread == 0) {
      reinterpret_cast<Split*>(smem + L::kSplits)[slot] = {work.item, work.head_group * params.m_tiles + m_tile, work.parts,
                                                             group - work.head_group};
    }
    announce_part(params, work.head_group * params.m_tiles + m_tile, team, thread & 127);
  }
}

// Eight warps: every part of the group's piece, to the output or the workspace.
template <typename Operands>
__device__ __forceinline__ void consume_steps(const Params& params, Schedule& schedule,
                                              const NarrowBarriers<typename Operands::L>& barriers, char* smem, uint32_t base,
                                              int group, int m_tile, int thread) {
  using L = typename Operands::L;
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
    hidden[i] = params.causal ? max(0, params.s_q - 1 - (m_tile * L::kRows + g + 8 * i) / params.h_q) : 0;
  }
  const int always_seen = params.causal ? params.s_q - 1 : 0;

  Work work;
  uint32_t step = 0;   // of the CTA's stream, at the item's beginning
  uint32_t items = 0;
  uint32_t uses = 0;   // of this team's exchange buffer
  while (schedule.next(work)) {
    typename Operands::Query query;
    mbarrier_wait(barriers.query_full(), items & 1);
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
      mbarrier_wait(barriers.full(slot), (step + i) / L::kRawSlots & 1);
      float s[kGroups][4];
      Operands operands;
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
      operands.values(o, weight, tokens, block, lane, used);
      warp_arrive(barriers.empty(slot), lane);
    }
    step += steps;
    ++items;

    softmax.add_lanes();
    mbarrier_wait(barriers.exchange_empty(team), (uses & 1) ^ 1);
    ++uses;
    finish_part<Operands>(params, work, barriers, smem, group, m_tile, thread, o, softmax);
  }
}

// One warp: the steps of the group's whole stream into the ring.
template <typename Operands>
__device__ __forceinline__ void load_steps(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                           const NarrowBarriers<typename Operands::L>& barriers, uint32_t ring, int lane) {
  using L = typename Operands::L;
  const uint64_t policy = schedule.cache_policy();
  Work work;
  uint32_t step = 0;
  while (schedule.next(work)) {
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
      Operands::load(params, map, ring + slot * L::kStepBytes, barriers.full(slot), page, i % kSteps, policy, lane);
      __syncwarp();
    }
  }
}

template <typename Operands>
__global__ void __launch_bounds__(Operands::L::kThreads, 1)
mla_decode_narrow_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                         const __grid_constant__ CUtensorMap cache_map) {
  using L = typename Operands::L;
  using T = typename Operands::T;
  extern __shared__ char dynamic_smem[];
  char* smem = dynamic_smem;
  const uint32_t base = align_shared(smem);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const NarrowBarriers<L> barriers(base + L::kBarriers);
  if (warp == 0) {
    if (lane == 0) barriers.init();
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, blockIdx.x % params.m_tiles, threadIdx.x - 32);
  } else if (warp == 8) {
    prefetch_block_table(params, lane);
  } else if (warp == 9) {
    if (lane == 0) prefetch_tensor_map(&query_map);
    if (Operands::kStepTokens < kTileTokens && lane == 1) prefetch_tensor_map(&cache_map);
  }
  __syncthreads();

  const int group = blockIdx.x / params.m_tiles;
  const int m_tile = blockIdx.x - group * params.m_tiles;
  Schedule schedule(params, group, lane);
  if (warp >= 8) {
    shrink_registers<kProducerRegisters>();
    if (warp == 8) {
      load_steps<Operands>(params, &cache_map, schedule, barriers, base + L::kRing, lane);
    } else if (warp == 9) {
      load_queries(params, &query_map, schedule, barriers, base + L::kQuery, m_tile, lane);
    }
  } else {
    grow_registers<kTeamRegisters>();
    const int thread = threadIdx.x;
    consume_steps<Operands>(params, schedule, barriers, smem, base, group, m_tile, thread);
    const RowTable table = row_table<L>(smem);
    if (schedule.has_empty_items) {
#pragma unroll 1
      for (int item = group; item < params.batch; item += params.groups) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, table, item, thread);
      }
    }
    named_sync(kMergeBarrier, kMergeThreads);  // both teams are done with the ring
#pragma unroll 1
    for (int slot = 0; slot < 2; ++slot) {
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) {
        merge<T, typename Operands::Order>(params, table, split, thread, reinterpret_cast<float*>(smem + L::kRing));
      }
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CUH_
