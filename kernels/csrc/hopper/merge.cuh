// Merges the parts of a split item. Every CTA that computed a part waits for the others (all CTAs of the launch are
// resident, the launch is cooperative) and then merges its own share of the item's output; parts are added in their
// order along the cache, so the result does not depend on who came first.
#ifndef MLA_HOPPER_MERGE_CUH_
#define MLA_HOPPER_MERGE_CUH_

#include "epilogue.cuh"

namespace mla_hopper {

constexpr int kMergeThreads = 256;
constexpr int kMergeBarrier = 4;

struct Split {
  int item;
  int head;   // CTA that computed the first part
  int parts;  // 0: nothing to merge
  int mine;   // which part this CTA computed
};

// A CTA takes part in at most two split items: its first (whose beginning is elsewhere) and its last.
struct Splits {
  Split first = {0, 0, 0, 0};
  Split last = {0, 0, 0, 0};
  __device__ __forceinline__ void record(int slot, const Split& split) {
    if (slot == 0) {
      first = split;
    } else {
      last = split;
    }
  }
};

// The first part of an item is the last work of its CTA (slot 1), every other part the first of its CTA (slot 0).
__device__ __forceinline__ const float4* part_of(const Params& params, const Split& split, int part) {
  return partial_slot(params, split.head + part * params.m_tiles, part == 0);
}

// kTasks consecutive pieces (16 rows x 8 columns each) by one warp of a team; team member `member` of `members` takes
// every members-th part.
template <int kTasks>
__device__ __forceinline__ void add_parts(const Params& params, const Split& split, const float* weights, int weight_stride,
                                          int piece, int pieces, int member, int members, int lane,
                                          float4 (&sum)[kTasks]) {
  constexpr int kBatch = 16 / kTasks;
#pragma unroll
  for (int i = 0; i < kTasks; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int first = member; first < split.parts; first += members * kBatch) {
    float4 value[kBatch][kTasks];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int part = first + j * members;
      const float4* source = part_of(params, split, part) + lane;
#pragma unroll
      for (int i = 0; i < kTasks; ++i) {
        if (part < split.parts && i < pieces) value[j][i] = __ldcg(source + (piece + i) * 32);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int part = first + j * members;
      if (part < split.parts) {
#pragma unroll
        for (int i = 0; i < kTasks; ++i) {
          if (i < pieces) {
            const int row = (piece + i) / 64 * 16 + lane / 4;
            const float low = weights[2 * (part * weight_stride + row)];
            const float high = weights[2 * (part * weight_stride + row + 8)];
            sum[i].x += low * value[j][i].x;
            sum[i].y += low * value[j][i].y;
            sum[i].z += high * value[j][i].z;
            sum[i].w += high * value[j][i].w;
          }
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_piece(const Params& params, const Split& split, int m_tile, int piece, int lane,
                                            const float4& value) {
  const int row = piece / 64 * 16 + lane / 4;
  const int column = piece % 64 * 8 + 2 * (lane & 3);
  T* low = output_row<T>(params, split.item, m_tile, row);
  T* high = output_row<T>(params, split.item, m_tile, row + 8);
  if (low != nullptr) *reinterpret_cast<uint32_t*>(low + column) = pack(value.x, value.y, T());
  if (high != nullptr) *reinterpret_cast<uint32_t*>(high + column) = pack(value.z, value.w, T());
}

// `scratch`: shared memory, at least parts * (rows + 1) * 8 + 4096 bytes. Called by kMergeThreads threads.
template <typename T>
__device__ __forceinline__ void merge(const Params& params, const Split& split, int m_tile, int thread, float* scratch) {
  const int lane = thread & 31;
  const int warp = thread / 32;
  if (thread == 0) {
    const uint32_t wanted = 2 * split.parts;  // both consumer warpgroups of every part
    while (load_acquire(params.arrived + split.head) != wanted) {
    }
  }
  MLA_TRACE(11);
  named_sync(kMergeBarrier, kMergeThreads);

  // Weights: exp2(maximum of the part - maximum) / denominator, for every part and row.
  const int rows = params.row_groups * 16;
  const int stride = rows + 1;  // keeps the parts of one row in different banks
  float2* stats = reinterpret_cast<float2*>(scratch);
  for (int index = thread; index < split.parts * rows; index += kMergeThreads) {
    const int part = index / rows;
    const int row = index - part * rows;
    const float2* source = params.stats + (2 * (split.head + part * params.m_tiles) + (part == 0)) * 64;
    stats[part * stride + row] = __ldcg(source + row);
  }
  named_sync(kMergeBarrier, kMergeThreads);
  MLA_TRACE(12);
  const int lanes = rows <= 16 ? 16 : (rows <= 32 ? 8 : 4);  // lanes that share a row
  const int row = thread / lanes;
  if (row < rows) {  // uniform over every group of `lanes` lanes
    const unsigned mask = (lanes == 16 ? 0xFFFFu : (lanes == 8 ? 0xFFu : 0xFu)) << (lane & ~(lanes - 1));
    float maximum = -INFINITY;
    for (int part = thread % lanes; part < split.parts; part += lanes) {
      maximum = fmaxf(maximum, stats[part * stride + row].x);
    }
    for (int offset = 1; offset < lanes; offset *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(mask, maximum, offset));
    const float reference = maximum == -INFINITY ? 0.f : maximum;
    float sum = 0.f;
    for (int part = thread % lanes; part < split.parts; part += lanes) {
      const float2 stat = stats[part * stride + row];
      sum += stat.y * exp2_approximate(stat.x - reference);
    }
    for (int offset = 1; offset < lanes; offset *= 2) sum += __shfl_xor_sync(mask, sum, offset);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    for (int part = thread % lanes; part < split.parts; part += lanes) {
      stats[part * stride + row].x = exp2_approximate(stats[part * stride + row].x - reference) * inverse;
    }
    if (split.mine == 0 && thread % lanes == 0) store_lse(params, split.item, m_tile, row, maximum, sum);
  }
  named_sync(kMergeBarrier, kMergeThreads);

  MLA_TRACE(13);
  const int pieces = params.row_groups * 64;
  const int share = (pieces + split.parts - 1) / split.parts;
  const int begin = min(split.mine * share, pieces);
  const int count = min(share, pieces - begin);
  if (share >= 16) {
#pragma unroll 1
    for (int i = warp * 4; i < count; i += 32) {
      float4 sum[4];
      add_parts<4>(params, split, scratch, stride, begin + i, min(4, count - i), 0, 1, lane, sum);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (i + k < count) store_piece<T>(params, split, m_tile, begin + i + k, lane, sum[k]);
      }
    }
  } else {
    // Few pieces, many parts: several warps share a piece and add up through shared memory.
    const int members = share > 4 ? 1 : (share > 2 ? 2 : (share > 1 ? 4 : 8));
    const int teams = 8 / members;
    float4* exchange = reinterpret_cast<float4*>(scratch + 2 * ((split.parts * stride + 1) & ~1));
#pragma unroll 1
    for (int i = warp / members; i - warp / members < count; i += teams) {
      float4 sum[1];
      if (i < count) {
        add_parts<1>(params, split, scratch, stride, begin + i, 1, warp % members, members, lane, sum);
      }
      if (members > 1) {
        exchange[thread] = sum[0];
        named_sync(kMergeBarrier, kMergeThreads);
        if (i < count && warp % members == 0) {
          for (int member = 1; member < members; ++member) {
            const float4 other = exchange[thread + member * 32];
            sum[0].x += other.x;
            sum[0].y += other.y;
            sum[0].z += other.z;
            sum[0].w += other.w;
          }
        }
        named_sync(kMergeBarrier, kMergeThreads);
      }
      if (i < count && warp % members == 0) store_piece<T>(params, split, m_tile, begin + i, lane, sum[0]);
    }
  }

  MLA_TRACE(14);
  // The last to finish leaves the counters as the next launch expects them.
  named_sync(kMergeBarrier, kMergeThreads);
  if (thread == 0) {
    if (atomicAdd(params.finished + split.head, 1u) == static_cast<uint32_t>(split.parts - 1)) {
      params.arrived[split.head] = 0;
      params.finished[split.head] = 0;
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_MERGE_CUH_
