// The MLA decode kernel for sm_90a: one launch, one CTA on every multiprocessor.
//
// A CTA holds 64 query rows (rows = queries x heads) in shared memory and streams 64-token tiles of the latent cache
// through two 72 KB stages, each read once from memory and used twice: as keys (576 wide, K-major) and as values (512
// wide, MN-major). Warpgroup 0 computes scores, softmax and output columns 0..255; warpgroup 1 output columns 256..511
// with the weights it finds in shared memory; of warpgroup 2, warp 0 feeds the cache tiles by bulk tensor copies and
// the others the query rows.
#ifndef MLA_HOPPER_DECODE_CUH_
#define MLA_HOPPER_DECODE_CUH_

#include "barriers.cuh"
#include "merge.cuh"
#include "schedule.cuh"
#include "unpack.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

// One warp feeds the cache tiles.
template <typename L>
__device__ __forceinline__ void load_cache(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                           const Barriers<L>& barriers, uint32_t cache, int lane) {
  Work work;
  uint32_t tile = 0;
  while (schedule.next(work)) {
    const int32_t* pages = params.block_table + work.item * params.block_table_stride;
    for (int chunk = work.first; chunk < work.last; chunk += 32) {
      const int mine = chunk + lane < work.last ? pages[chunk + lane] : 0;
      const int count = min(32, work.last - chunk);
#pragma unroll 1
      for (int i = 0; i < count; ++i, ++tile) {
        const int page = __shfl_sync(kAllLanes, mine, i);
        const uint32_t stage = tile % L::kStages;
        const uint32_t parity = (tile / L::kStages & 1) ^ 1;
#pragma unroll 1
        for (int piece = 0; piece < kPieces; ++piece) {
          // Rope is slab 8, left slabs 0..3, right slabs 4..7.
          const int slab = piece == kPieceRope ? 8 : 4 * (piece - 1);
          const int slabs = piece == kPieceRope ? 1 : 4;
          mbarrier_wait(barriers.empty(stage, piece), parity);
          if (tile == 0 && piece == 0) MLA_TRACE(20);
          if (lane == 0) mbarrier_expect(barriers.full(stage, piece), slabs * kSlabBytes);
          __syncwarp();
          if (lane < slabs) {
            tensor_copy(cache + stage * kTileBytes + (slab + lane) * kSlabBytes, map, barriers.full(stage, piece),
                        (slab + lane) * kColumns, 0, page, params.cache_policy);
          }
        }
      }
    }
  }
}

// The query rows of one item. Rows past the last one are zeros or, in row groups that do not exist, whatever shared
// memory held: they reach no output. One warp.
template <typename L>
__device__ __forceinline__ void load_query(const Params& params, const CUtensorMap* map, const Barriers<L>& barriers,
                                           uint32_t query, int item, int m_tile, int lane) {
  if (lane == 0) mbarrier_expect(barriers.query_full(), kSlabs * params.row_groups * 16 * 128);
  __syncwarp();
  if (lane < kSlabs) {
    tensor_copy(query + lane * L::kQuerySlabBytes, map, barriers.query_full(), lane * kColumns, m_tile * kTileRows, item,
                kKeepInL2);
  }
}

// Another warp feeds the query rows.
template <typename L>
__device__ __forceinline__ void load_queries(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                             const Barriers<L>& barriers, uint32_t query, int m_tile, int lane) {
  Work work;
  uint32_t count = 0;
  while (schedule.next(work)) {
    mbarrier_wait(barriers.query_empty(), (count & 1) ^ 1);
    load_query(params, map, barriers, query, work.item, m_tile, lane);
    ++count;
  }
}

// The values of tokens from `used` on in the four slabs from `slab` on: a softmax weight of 0 would not hide a NaN.
__device__ __forceinline__ void clear_unused(char* stage, int slab, int used, int thread) {
  const int vectors = (kTileTokens - used) * 8;
#pragma unroll 1
  for (int end = slab + 4; slab < end; ++slab) {
    uint4* unused = reinterpret_cast<uint4*>(stage + slab * kSlabBytes + used * 128);
#pragma unroll 1
    for (int i = thread; i < vectors; i += 128) unused[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
}

// D (+)= Q K^T over the slabs of one piece, as they arrive.
template <typename T, typename L, int kFirst, int kCount>
__device__ __forceinline__ void compute_scores(float (&s)[32], uint64_t query, uint64_t cache, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int slab = kFirst; slab < kFirst + kCount; ++slab) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Wgmma<T>::scores(s, query + ((slab * L::kQuerySlabBytes + k * 32) >> 4), cache + ((slab * kSlabBytes + k * 32) >> 4),
                       accumulate || slab > kFirst || k > 0);
    }
  }
}

__device__ __forceinline__ void rescale(float (&o)[128], float low, float high) {
  if (__all_sync(kAllLanes, low == 1.f && high == 1.f)) return;
#pragma unroll
  for (int i = 0; i < 128; i += 4) {
    o[i] *= low;
    o[i + 1] *= low;
    o[i + 2] *= high;
    o[i + 3] *= high;
  }
}

// Split parts: the warpgroup's share is in the workspace; says so once every thread of it has stored.
__device__ __forceinline__ void announce_part(const Params& params, const Work& work, int m_tile, int half, int thread) {
  named_sync(kStoredBarrier + half, 128);
  if (thread == 0) {
    add_release(params.arrived + work.head_group * params.m_tiles + m_tile, 1);
  }
}

template <typename T, typename L>
__device__ __forceinline__ void consume_left(const Params& params, const CUtensorMap* query_map, Schedule& schedule, const Barriers<L>& barriers, char* smem,
                                             uint32_t base, int cta, int group, int m_tile, int thread) {
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

  float o[128];
  float s[32];
  uint32_t p[4][4];
  Work work;
  uint32_t tile = 0;
  uint32_t items = 0;
  while (schedule.next(work)) {
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};
    if (L::kFp8 && warp == 0) load_query(params, query_map, barriers, base + L::kQuery, work.item, m_tile, lane);
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
      compute_scores<T, L, 8, 1>(s, query, keys, false);
      mbarrier_wait(barriers.full(stage, kPieceLeft), parity);
      compute_scores<T, L, 0, 4>(s, query, keys, true);
      mbarrier_wait(barriers.full(stage, kPieceRight), parity);
      compute_scores<T, L, 4, 4>(s, query, keys, true);
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) {
        mbarrier_arrive(barriers.empty(stage, kPieceRope));
        if (t == work.last - 1) mbarrier_arrive(barriers.query_empty());
      }
      if (params.stagger && t > work.first) named_arrive(kScoresDone, 256);
      const int used = work.length - t * kTileTokens;
      if (used < kTileTokens) {
        clear_unused(smem + L::kCache + stage * kTileBytes, 0, used, thread);
        named_sync(kLeftBarrier, 128);
      }
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
      if (tile > 0) named_sync(kWeightsFree, 256);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          // 16-byte column j of the row, swizzled; row and row + 8 have the same low three bits.
          const uint32_t address = weights + i * 1024 + ((j ^ (row & 7)) << 4);
          asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(p[j / 2][2 * (j & 1) + i]) : "memory");
        }
      }
      if ((lane & 3) == 0) {
        alpha_shared[row] = alpha[0];
        alpha_shared[row + 8] = alpha[1];
      }
      fence_async_proxy();
      named_arrive(kWeightsReady, 256);
      MLA_TRACE(7);
      if (t > work.first) rescale(o, alpha[0], alpha[1]);
      const uint64_t values = matrix_descriptor(stage_address, kSlabBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) Wgmma<T>::values(o, p[k], values + (k * 2048 >> 4), k > 0 || t > work.first);
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(barriers.empty(stage, kPieceLeft));
      MLA_TRACE(8);
    }

    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      inverse[i] = sum[i] == 0.f ? 0.f : __frcp_rn(sum[i]);
      if ((lane & 3) == 0) inverse_shared[row + 8 * i] = inverse[i];
    }
    named_arrive(kInverseReady, 256);
    if (work.parts == 1) {
      if ((lane & 3) == 0) {
        store_lse(params, table, work.item, row, maximum[0], sum[0]);
        store_lse(params, table, work.item, row + 8, maximum[1], sum[1]);
      }
      store_output<T>(params, table, work.item, warp, row, 0, lane, o, inverse);
    } else {
      const int slot = group == work.head_group;
      if (thread == 0) {
        reinterpret_cast<Split*>(smem + L::kSplits)[slot] = {work.item, work.head_group * params.m_tiles + m_tile, work.parts,
                                                             group - work.head_group};
      }
      if ((lane & 3) == 0) {
        float2* stats = params.stats + (2 * cta + slot) * 64;
        stats[row] = make_float2(maximum[0], sum[0]);
        stats[row + 8] = make_float2(maximum[1], sum[1]);
      }
      store_partial(params, cta, slot, warp, 0, lane, o);
      announce_part(params, work, m_tile, 0, thread);
    }
    MLA_TRACE(9);
    ++items;
  }
  if (tile > 0) named_sync(kWeightsFree, 256);
  MLA_TRACE(10);
}

template <typename T, typename L>
__device__ __forceinline__ void consume_right(const Params& params, Schedule& schedule, const Barriers<L>& barriers,
                                              char* smem, uint32_t base, int cta, int group, int m_tile, int thread) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int row = warp * 16 + lane / 4;
  const float* alpha_shared = reinterpret_cast<const float*>(smem + L::kAlpha);
  const float* inverse_shared = reinterpret_cast<const float*>(smem + L::kInverse);
  const RowTable table = row_table<L>(smem);
  const uint64_t weights = matrix_descriptor(base + L::kWeights, 16, 1024);

  float o[128];
  Work work;
  uint32_t tile = 0;
  while (schedule.next(work)) {
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      const uint32_t stage = tile % L::kStages;
      const uint32_t stage_offset = L::kCache + stage * kTileBytes;
      mbarrier_wait(barriers.full(stage, kPieceRight), tile / L::kStages & 1);
      const int used = work.length - t * kTileTokens;
      if (used < kTileTokens) clear_unused(smem + stage_offset, 4, used, thread);
      named_sync(kWeightsReady, 256);
      if (t > work.first) rescale(o, alpha_shared[row], alpha_shared[row + 8]);
      // Leaves the tensor cores to the other warpgroup until its next scores are done, and takes them during its softmax.
      if (params.stagger && t < work.last - 1) named_sync(kScoresDone, 256);
      const uint64_t values = matrix_descriptor(base + stage_offset + 4 * kSlabBytes, kSlabBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T>::values(o, weights + (k * 32 >> 4), values + (k * 2048 >> 4), k > 0 || t > work.first);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (t < work.last - 1) named_arrive(kWeightsFree, 256);
      if (lane == 0) mbarrier_arrive(barriers.empty(stage, kPieceRight));
    }

    named_sync(kInverseReady, 256);
    const float inverse[2] = {inverse_shared[row], inverse_shared[row + 8]};
    named_arrive(kWeightsFree, 256);  // only now may the other warpgroup run into its next item's end
    if (work.parts == 1) {
      store_output<T>(params, table, work.item, warp, row, 1, lane, o, inverse);
    } else {
      const int slot = group == work.head_group;
      store_partial(params, cta, slot, warp, 1, lane, o);
      announce_part(params, work, m_tile, 1, thread);
    }
  }
}

// Asks for the block table, so that it is in L2 by the time the schedule says which pages are wanted.
__device__ __forceinline__ void prefetch_block_table(const Params& params, int lane) {
  const int lines = max(1, (params.max_length / kTileTokens + 31) / 32);  // of 128 bytes in a row
  const int index = blockIdx.x * 32 + lane;
  const int item = index / lines;
  if (item < params.batch) {
    const int32_t* line = params.block_table + item * params.block_table_stride + index % lines * 32;
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(line) : "memory");
  }
}

template <typename T, typename L>
__global__ void __launch_bounds__(kThreads, 1)
mla_decode_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                  const __grid_constant__ CUtensorMap cache_map) {
  MLA_TRACE(0);
  extern __shared__ char dynamic_smem[];
  const uint32_t unaligned = shared_address(dynamic_smem);
  const uint32_t base = (unaligned + 1023) & ~1023u;
  char* smem = dynamic_smem + (base - unaligned);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const Barriers<L> barriers = {base + L::kBarriers};
  if (warp == 0) {
    if (lane == 0) init_barriers(barriers);
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, blockIdx.x % params.m_tiles, threadIdx.x - 32);
  } else if (warp == 3) {
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp == 10) {
    prefetch_block_table(params, lane);
  } else if (warp == 11) {
    if (lane == 0) prefetch_tensor_map(&cache_map);
    if (lane == 1) prefetch_tensor_map(&query_map);
  }
  __syncthreads();

  if (warp >= 8) {
    shrink_registers<L::kFp8 ? 88 : 56>();
    if (L::kFp8 || warp < 10) {
      const int cta = block_index();
      const int group = cta / params.m_tiles;
      const int m_tile = cta - group * params.m_tiles;
      Schedule schedule(params, group, lane);
      if constexpr (L::kFp8) {
        unpack_cache(params, schedule, barriers, smem, base, threadIdx.x - 256);
      } else if (warp == 8) {
        load_cache(params, &cache_map, schedule, barriers, base + L::kCache, lane);
      } else {
        load_queries(params, &query_map, schedule, barriers, base + L::kQuery, m_tile, lane);
      }
    }
  } else {
    grow_registers<L::kFp8 ? 208 : 224>();
    MLA_TRACE(1);
    const int cta = block_index();
    const int group = cta / params.m_tiles;
    const int m_tile = cta - group * params.m_tiles;
    Schedule schedule(params, group, lane);
    MLA_TRACE(2);
    const bool has_empty_items = schedule.has_empty_items;
    if (warp < 4) {
      consume_left<T, L>(params, &query_map, schedule, barriers, smem, base, cta, group, m_tile, threadIdx.x);
    } else {
      consume_right<T, L>(params, schedule, barriers, smem, base, cta, group, m_tile, threadIdx.x - 128);
    }
    const RowTable table = row_table<L>(smem);
    if (has_empty_items) {
#pragma unroll 1
      for (int item = group; item < params.batch; item += params.groups) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, table, item, threadIdx.x);
      }
    }
    named_sync(kMergeBarrier, kMergeThreads);  // both warpgroups are done with the cache stages
#pragma unroll 1
    for (int slot = 0; slot < 2; ++slot) {
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) merge<T>(params, table, split, threadIdx.x, reinterpret_cast<float*>(smem + L::kCache));
      MLA_TRACE(16 + slot);
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_DECODE_CUH_
