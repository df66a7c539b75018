// Warpgroup 0: scores, online softmax, statistics.
#ifndef MLA_HOPPER_SCORES_CUH_
#define MLA_HOPPER_SCORES_CUH_

#include "barriers.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

// D (+)= Q K^T over the slabs of one piece; the first piece starts D.
template <typename T, typename L, int kPiece>
__device__ __forceinline__ void compute_scores(float (&s)[32], uint64_t query, uint64_t cache) {
  constexpr int kFirst = first_slab(kPiece);
  wgmma_fence();
#pragma unroll
  for (int slab = kFirst; slab < kFirst + slab_count(kPiece); ++slab) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t keys = cache + ((slab * kSlabBytes + k * 32) >> 4);
      Wgmma<T>::scores(s, query + ((slab * L::kQuerySlabBytes + k * 32) >> 4), keys, kPiece > 0 || k > 0);
    }
  }
}

template <typename T, typename L>
__device__ __forceinline__ void compute_weights(const Params& params, const CUtensorMap* query_map, Schedule& schedule,
                                                const Barriers<L>& barriers, char* smem, uint32_t base, int cta, int group,
                                                int m_tile, int thread) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int row = warp * 16 + lane / 4;  // and row + 8
  const int column = 2 * (lane & 3);
  float* alpha_shared = reinterpret_cast<float*>(smem + L::kAlpha);
  float* inverse_shared = reinterpret_cast<float*>(smem + L::kInverse);
  const RowTable table = row_table<L>(smem);
  const uint32_t weights = base + L::kWeights + row * 128 + (lane & 3) * 4;
  const uint64_t query = matrix_descriptor(base + L::kQuery, 16, 1024);
  // Tokens that query rows `row` and `row + 8` do not see, counted from the end.
  int hidden[2] = {0, 0};
  if (params.causal) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      hidden[i] = max(0, params.s_q - 1 - (m_tile * kTileRows + row + 8 * i) / params.h_q);
    }
  }
  const int always_seen = params.causal ? params.s_q - 1 : 0;

  float s[32];
  uint32_t p[4][4];
  Work work;
  uint32_t tile = 0;
  uint32_t items = 0;
  while (schedule.next(work)) {
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};
    if (warp == 0) {
      mbarrier_wait(barriers.query_empty(), (items & 1) ^ 1);
      load_query(params, query_map, barriers, base + L::kQuery, work.item, m_tile, lane);
    }
    mbarrier_wait(barriers.query_full(), items & 1);
    MLA_TRACE(3);
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      const uint32_t stage = tile % L::kStages;
      const uint32_t parity = tile / L::kStages & 1;
      const uint32_t stage_address = base + L::kCache + stage * kTileBytes;
      const uint64_t keys = matrix_descriptor(stage_address, 16, 1024);
      mbarrier_wait(barriers.full(stage, kPieceRope), parity);
      MLA_TRACE(4);
      compute_scores<T, L, kPieceRope>(s, query, keys);
      mbarrier_wait(barriers.full(stage, 1), parity);
      compute_scores<T, L, 1>(s, query, keys);
      mbarrier_wait(barriers.full(stage, 2), parity);
      compute_scores<T, L, 2>(s, query, keys);
      mbarrier_wait(barriers.full(stage, 3), parity);
      compute_scores<T, L, 3>(s, query, keys);
      mbarrier_wait(barriers.full(stage, 4), parity);
      compute_scores<T, L, 4>(s, query, keys);
      wgmma_commit();
      wgmma_wait<0>();
      release(barriers, stage, kPieceRope, lane);
      if (t == work.last - 1 && lane == 0) mbarrier_arrive(barriers.query_empty());
      const int used = work.length - t * kTileTokens;
      MLA_TRACE(5);

      // Online softmax in log2 units; a thread holds 16 columns of each of its two rows.
      float alpha[2];
      if (params.negative) {
#pragma unroll
        for (int j = 0; j < 32; ++j) s[j] = -s[j];
      }
      if (used < kTileTokens + always_seen) {
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int limit = used - hidden[j & 1] - column - 8 * (j / 2);
          if (limit <= 0) s[2 * j] = -INFINITY;
          if (limit <= 1) s[2 * j + 1] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = s[2 * i];
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        largest = fmaxf(maximum[i], largest * params.scale_log2);
        const float reference = largest == -INFINITY ? 0.f : largest;
        alpha[i] = exp2_approximate(maximum[i] - reference);
        maximum[i] = largest;
        float partial = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float x = exp2_approximate(s[4 * j + 2 * i] * params.scale_log2 - reference);
          const float y = exp2_approximate(s[4 * j + 2 * i + 1] * params.scale_log2 - reference);
          partial += x + y;
          p[j / 2][2 * (j & 1) + i] = pack(x, y, T());
        }
        sum[i] = sum[i] * alpha[i] + partial;
      }

      MLA_TRACE(6);
      if (tile > 0) named_sync(kWeightsFree, 384);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          // 16-byte column j of the row, swizzled; row and row + 8 have the same low three bits.
          const uint32_t address = weights + i * 1024 + ((j ^ (row & 7)) << 4);
          store_shared(address, p[j / 2][2 * (j & 1) + i]);
        }
      }
      if ((lane & 3) == 0) {
        alpha_shared[row] = alpha[0];
        alpha_shared[row + 8] = alpha[1];
      }
      fence_async_proxy();
      named_arrive(kWeightsReady, 384);
      MLA_TRACE(7);
    }

    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      inverse[i] = sum[i] == 0.f ? 0.f : __frcp_rn(sum[i]);
      if ((lane & 3) == 0) inverse_shared[row + 8 * i] = inverse[i];
    }
    if ((lane & 3) == 0) {
      if (work.parts == 1) {
        store_lse(params, table, work.item, row, maximum[0], sum[0]);
        store_lse(params, table, work.item, row + 8, maximum[1], sum[1]);
      } else {
        float2* stats = params.stats + (2 * cta + (group == work.head_group)) * 64;
        stats[row] = make_float2(maximum[0], sum[0]);
        stats[row + 8] = make_float2(maximum[1], sum[1]);
      }
    }
    named_arrive(kInverseReady, 384);  // the value warpgroups announce the statistics with their own results
    MLA_TRACE(9);
    ++items;
  }
  if (tile > 0) named_sync(kWeightsFree, 384);
  MLA_TRACE(10);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_SCORES_CUH_
