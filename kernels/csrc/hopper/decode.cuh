// The MLA decode kernel for sm_90a: one launch, one CTA on every multiprocessor.
//
// A CTA holds 64 query rows (rows = queries x heads) in shared memory and streams 64-token tiles of the latent cache
// through two 72 KB stages, each read once from memory and used twice: as keys (576 wide, K-major) and as values (512
// wide, MN-major). Warpgroup 0 computes scores, softmax and output columns 0..255; warpgroup 1 output columns 256..511
// with the weights it finds in shared memory; of warpgroup 2, warp 0 feeds the cache tiles by bulk tensor copies and
// the others the query rows.
#ifndef MLA_HOPPER_DECODE_CUH_
#define MLA_HOPPER_DECODE_CUH_

#include "merge.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

constexpr int kWeightsReady = 1;   // named barriers; 0 is __syncthreads, 4 the merge's
constexpr int kWeightsFree = 2;
constexpr int kInverseReady = 3;
constexpr int kStoredBarrier = 5;  // and 6: the threads of one consumer warpgroup
constexpr int kQueryLoaders = 96;

struct Barriers {
  uint32_t cache_full, cache_empty, query_full, query_empty;  // cache_*: kStages barriers of 8 bytes
};

__device__ __forceinline__ void load_cache(const Params& params, const CUtensorMap* map, Schedule& schedule,
                                           const Barriers& barriers, uint32_t cache, int lane) {
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
        const uint32_t stage = tile % kStages;
        const uint32_t full = barriers.cache_full + 8 * stage;
        mbarrier_wait(barriers.cache_empty + 8 * stage, (tile / kStages & 1) ^ 1);
        if (lane == 0) {
          mbarrier_expect(full, kTileBytes);
#pragma unroll
          for (int slab = 0; slab < kSlabs; ++slab) {
            tensor_copy(cache + stage * kTileBytes + slab * kSlabBytes, map, full, slab * kColumns, 0, page,
                        params.cache_policy);
          }
        }
        __syncwarp();
      }
    }
  }
}

// Rows past the last query row keep whatever shared memory held: they reach no output.
template <typename T>
__device__ __forceinline__ void load_queries(const Params& params, Schedule& schedule, const Barriers& barriers,
                                             uint32_t query, int m_tile, int thread) {
  const int rows = min(kTileRows, params.rows - m_tile * kTileRows);
  Work work;
  uint32_t count = 0;
  while (schedule.next(work)) {
    mbarrier_wait(barriers.query_empty, (count & 1) ^ 1);
    const T* q = static_cast<const T*>(params.q) + work.item * params.q_stride_batch;
#pragma unroll 4
    for (int index = thread; index < rows * (kDim / 8); index += kQueryLoaders) {
      const int row = index / (kDim / 8);
      const int vector = index - row * (kDim / 8);
      const int flat = m_tile * kTileRows + row;
      const int seq = flat / params.h_q;
      const int head = flat - seq * params.h_q;
      async_copy_16(query + (vector / 8) * kSlabBytes + row * 128 + (((vector & 7) ^ (row & 7)) << 4),
                    q + seq * params.q_stride_seq + head * params.q_stride_head + vector * 8);
    }
    async_copy_wait();
    fence_async_proxy();
    mbarrier_arrive(barriers.query_full);
    ++count;
  }
}

// D = Q K^T of one tile.
template <typename T>
__device__ __forceinline__ void compute_scores(float (&s)[32], uint64_t query, uint64_t cache) {
  wgmma_fence();
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t offset = (slab * kSlabBytes + k * 32) >> 4;
      Wgmma<T>::scores(s, query + offset, cache + offset, slab + k > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
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
    __threadfence();
    add_release(params.arrived + work.head_group * params.m_tiles + m_tile, 1);
  }
}

template <typename T>
__device__ __forceinline__ void consume_left(const Params& params, Schedule& schedule, const Barriers& barriers, char* smem,
                                             uint32_t base, int cta, int group, int m_tile, int thread,
                                             Splits& splits) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int row = warp * 16 + lane / 4;  // and row + 8
  const int column = 2 * (lane & 3);
  float* alpha_shared = reinterpret_cast<float*>(smem + kAlphaOffset);
  float* inverse_shared = reinterpret_cast<float*>(smem + kInverseOffset);
  const uint32_t weights = base + kWeightOffset + row * 128 + (lane & 3) * 4;
  const uint64_t query = matrix_descriptor(base + kQueryOffset, 16, 1024);
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
    mbarrier_wait(barriers.query_full, items & 1);
    MLA_TRACE(3);
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      const uint32_t stage = tile % kStages;
      mbarrier_wait(barriers.cache_full + 8 * stage, tile / kStages & 1);
      const uint32_t stage_address = base + kCacheOffset + stage * kTileBytes;
      MLA_TRACE(4);
      compute_scores<T>(s, query, matrix_descriptor(stage_address, 16, 1024));
      if (t == work.last - 1 && lane == 0) mbarrier_arrive(barriers.query_empty);
      MLA_TRACE(5);

      // Online softmax in log2 units; a thread holds 16 columns of each of its two rows.
      float alpha[2];
      const bool masked = (t + 1) * kTileTokens > work.length - always_seen;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = maximum[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& x = s[4 * j + 2 * i];
          float& y = s[4 * j + 2 * i + 1];
          x *= params.scale_log2;
          y *= params.scale_log2;
          if (masked) {
            const int limit = work.length - hidden[i] - t * kTileTokens - column - 8 * j;
            if (limit <= 0) x = -INFINITY;
            if (limit <= 1) y = -INFINITY;
          }
          largest = fmaxf(largest, fmaxf(x, y));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        const float reference = largest == -INFINITY ? 0.f : largest;
        alpha[i] = exp2_approximate(maximum[i] - reference);
        maximum[i] = largest;
        float partial = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float x = exp2_approximate(s[4 * j + 2 * i] - reference);
          const float y = exp2_approximate(s[4 * j + 2 * i + 1] - reference);
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
      // The other warpgroup arrives at once but in a tile with unused tokens, whose values it clears first.
      if ((t + 1) * kTileTokens > work.length) {
        named_sync(kWeightsReady, 256);
      } else {
        named_arrive(kWeightsReady, 256);
      }
      MLA_TRACE(7);
      if (t > work.first) rescale(o, alpha[0], alpha[1]);
      const uint64_t values = matrix_descriptor(stage_address, kSlabBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) Wgmma<T>::values(o, p[k], values + (k * 2048 >> 4), k > 0 || t > work.first);
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(barriers.cache_empty + 8 * stage);
      MLA_TRACE(8);
    }

    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      inverse[i] = sum[i] == 0.f ? 0.f : 1.f / sum[i];
      if ((lane & 3) == 0) inverse_shared[row + 8 * i] = inverse[i];
    }
    named_arrive(kInverseReady, 256);
    if (work.parts == 1) {
      if ((lane & 3) == 0) {
        store_lse(params, work.item, m_tile, row, maximum[0], sum[0]);
        store_lse(params, work.item, m_tile, row + 8, maximum[1], sum[1]);
      }
      store_output<T>(params, work.item, m_tile, row, 0, lane, o, inverse);
    } else {
      const int slot = group == work.head_group;
      splits.record(slot, {work.item, work.head_group * params.m_tiles + m_tile, work.parts, group - work.head_group});
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

template <typename T>
__device__ __forceinline__ void consume_right(const Params& params, Schedule& schedule, const Barriers& barriers,
                                              char* smem, uint32_t base, int cta, int group, int m_tile, int thread,
                                              Splits& splits) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  const int row = warp * 16 + lane / 4;
  const float* alpha_shared = reinterpret_cast<const float*>(smem + kAlphaOffset);
  const float* inverse_shared = reinterpret_cast<const float*>(smem + kInverseOffset);
  const uint64_t weights = matrix_descriptor(base + kWeightOffset, 16, 1024);

  float o[128];
  Work work;
  uint32_t tile = 0;
  while (schedule.next(work)) {
#pragma unroll 1
    for (int t = work.first; t < work.last; ++t, ++tile) {
      const uint32_t stage = tile % kStages;
      const uint32_t stage_offset = kCacheOffset + stage * kTileBytes;
      mbarrier_wait(barriers.cache_full + 8 * stage, tile / kStages & 1);
      const int used = work.length - t * kTileTokens;
      if (used < kTileTokens) {
        // A weight of 0 does not hide a NaN: clear the values of unused tokens.
        const int vectors = (kTileTokens - used) * 8;
#pragma unroll 1
        for (int slab = 0; slab < kLatent / kColumns; ++slab) {
          uint4* unused = reinterpret_cast<uint4*>(smem + stage_offset + slab * kSlabBytes + used * 128);
#pragma unroll 1
          for (int i = thread; i < vectors; i += 128) unused[i] = make_uint4(0, 0, 0, 0);
        }
        fence_async_proxy();
      }
      named_sync(kWeightsReady, 256);
      if (t > work.first) rescale(o, alpha_shared[row], alpha_shared[row + 8]);
      const uint64_t values = matrix_descriptor(base + stage_offset + 4 * kSlabBytes, kSlabBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T>::values(o, weights + (k * 32 >> 4), values + (k * 2048 >> 4), k > 0 || t > work.first);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (t < work.last - 1) named_arrive(kWeightsFree, 256);
      if (lane == 0) mbarrier_arrive(barriers.cache_empty + 8 * stage);
    }

    named_sync(kInverseReady, 256);
    const float inverse[2] = {inverse_shared[row], inverse_shared[row + 8]};
    named_arrive(kWeightsFree, 256);  // only now may the other warpgroup run into its next item's end
    if (work.parts == 1) {
      store_output<T>(params, work.item, m_tile, row, 1, lane, o, inverse);
    } else {
      const int slot = group == work.head_group;
      splits.record(slot, {work.item, work.head_group * params.m_tiles + m_tile, work.parts, group - work.head_group});
      store_partial(params, cta, slot, warp, 1, lane, o);
      announce_part(params, work, m_tile, 1, thread);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
mla_decode_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap cache_map) {
  extern __shared__ char dynamic_smem[];
  const uint32_t unaligned = shared_address(dynamic_smem);
  const uint32_t base = (unaligned + 1023) & ~1023u;
  char* smem = dynamic_smem + (base - unaligned);

  MLA_TRACE(0);
  const int cta = blockIdx.x;
  const int group = cta / params.m_tiles;
  const int m_tile = cta - group * params.m_tiles;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  Barriers barriers;
  barriers.cache_full = base + kBarrierOffset;
  barriers.cache_empty = barriers.cache_full + 8 * kStages;
  barriers.query_full = barriers.cache_empty + 8 * kStages;
  barriers.query_empty = barriers.query_full + 8;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&cache_map);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(barriers.cache_full + 8 * stage, 1);
      mbarrier_init(barriers.cache_empty + 8 * stage, 8);  // consumer warps
    }
    mbarrier_init(barriers.query_full, kQueryLoaders);
    mbarrier_init(barriers.query_empty, 4);  // warps of warpgroup 0
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= 8) {
    shrink_registers<72>();
    Schedule schedule(params, group, lane);
    if (warp == 8) {
      load_cache(params, &cache_map, schedule, barriers, base + kCacheOffset, lane);
    } else {
      load_queries<T>(params, schedule, barriers, base + kQueryOffset, m_tile, threadIdx.x - 288);
    }
  } else {
    grow_registers<216>();
    MLA_TRACE(1);
    Schedule schedule(params, group, lane);
    MLA_TRACE(2);
    Splits splits;
    const bool has_empty_items = schedule.has_empty_items;
    if (warp < 4) {
      consume_left<T>(params, schedule, barriers, smem, base, cta, group, m_tile, threadIdx.x, splits);
    } else {
      consume_right<T>(params, schedule, barriers, smem, base, cta, group, m_tile, threadIdx.x - 128, splits);
    }
    if (has_empty_items) {
#pragma unroll 1
      for (int item = group; item < params.batch; item += params.groups) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, item, m_tile, threadIdx.x);
      }
    }
    if (splits.first.parts + splits.last.parts > 0) {
      named_sync(kMergeBarrier, kMergeThreads);  // both warpgroups are done with the cache stages
      float* scratch = reinterpret_cast<float*>(smem + kCacheOffset);
#pragma unroll 1
      for (int slot = 0; slot < 2; ++slot) {
        const Split split = slot == 0 ? splits.first : splits.last;
        if (split.parts > 0) merge<T>(params, split, m_tile, threadIdx.x, scratch);
        MLA_TRACE(16 + slot);
      }
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_DECODE_CUH_
