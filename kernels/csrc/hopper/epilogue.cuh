// From accumulators to memory: finished rows to the caller's output, parts of split items to the workspace.
#ifndef MLA_HOPPER_EPILOGUE_CUH_
#define MLA_HOPPER_EPILOGUE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.cuh"
#include "part_pack.cuh"
#include "ptx.cuh"

namespace mla_hopper {

constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Where the rows of a CTA's query tile lie in out and lse, counted from their item's first element: a table in shared
// memory, since it is the same for every item and costs divisions. Rows past the last one are negative.
struct RowTable {
  const int64_t* out;
  const int32_t* lse;
};

template <typename L>
__device__ __forceinline__ void fill_row_table(const Params& params, char* smem, int m_tile, int row) {
  const int flat = m_tile * L::kRows + row;
  const int seq = flat / params.h_q;
  const int head = flat - seq * params.h_q;
  const bool valid = row < L::kRows && flat < params.rows;
  reinterpret_cast<int64_t*>(smem + L::kOutRows)[row] =
      valid ? seq * params.out_stride_seq + head * params.out_stride_head : -1;
  reinterpret_cast<int32_t*>(smem + L::kLseRows)[row] = valid ? head * params.s_q + seq : -1;
}

template <typename L>
__device__ __forceinline__ RowTable row_table(const char* smem) {
  return {reinterpret_cast<const int64_t*>(smem + L::kOutRows), reinterpret_cast<const int32_t*>(smem + L::kLseRows)};
}

__device__ __forceinline__ void store_lse(const Params& params, const RowTable& table, int item, int row, float maximum,
                                          float sum) {
  const int offset = table.lse[row];
  if (offset < 0) return;
  params.lse[static_cast<int64_t>(item) * params.rows + offset] =
      sum == 0.f ? INFINITY : (maximum + __log2f(sum)) * kLn2;
}

// Of the sum of a row's softmax weights; 0 where nothing was seen.
__device__ __forceinline__ float inverse_of(float sum) { return sum == 0.f ? 0.f : __frcp_rn(sum); }

// First elements of output rows `row` and `row + 8` of an item, nullptr past the last row.
template <typename T>
struct RowPair {
  T* row[2];
  __device__ __forceinline__ RowPair(const Params& params, const RowTable& table, int item, int first) {
    T* item_out = static_cast<T*>(params.out) + item * params.out_stride_batch;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t offset = table.out[first + 8 * i];
      row[i] = offset < 0 ? nullptr : item_out + offset;
    }
  }

  // Two chunks of 8 columns from `column` on, as accumulator fragments: a lane holds columns 2 (lane % 4) and the next of
  // each, for both rows. Neighbouring lanes trade, so that each stores 4 columns and a quad 32 bytes.
  __device__ __forceinline__ void store(int column, int lane, const float4& first, const float4& second) const {
    const bool odd = lane & 1;
    column += 8 * odd + 2 * (lane & 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t a = i ? pack(first.z, first.w, T()) : pack(first.x, first.y, T());
      const uint32_t b = i ? pack(second.z, second.w, T()) : pack(second.x, second.y, T());
      const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? a : b, 1);
      if (row[i] != nullptr) {
        *reinterpret_cast<uint2*>(row[i] + column) = odd ? make_uint2(got, b) : make_uint2(a, got);
      }
    }
  }
};

// Stores this thread's share of a finished tile: scale[0] for its first row, scale[1] for the eighth after it.
template <typename T>
__device__ __forceinline__ void store_output(const Params& params, const RowTable& table, int item, int warp, int half,
                                             int lane, const float (&o)[128], const float (&scale)[2]) {
  if (warp >= params.row_groups) return;
  const RowPair<T> rows(params, table, item, warp * 16 + lane / 4);
#pragma unroll
  for (int chunk = 0; chunk < 32; chunk += 2) {
    float4 value[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int base = 4 * (chunk + i);
      value[i] = make_float4(o[base] * scale[0], o[base + 1] * scale[0], o[base + 2] * scale[1], o[base + 3] * scale[1]);
    }
    rows.store(half * 256 + 8 * chunk, lane, value[0], value[1]);
  }
}

// Float4 elements of what a cluster leaves in the workspace, unpacked.
__device__ __forceinline__ int slot_elements(const Params& params) { return params.row_groups * (2 * 32 * 32); }

// A part of an item in the workspace, in uint4: float2 [8 sets of columns, 8 row pairs], the factors of packed rows
// (part_pack.cuh), then [row_groups * 16 units, 2, 32 lanes], packed chunks. A unit is 16 rows x 32 columns, a set of columns
// what one warp stores.
constexpr int kFactorElements = 8 * 8 / 2;
constexpr int kUnitElements = 2 * 32;
constexpr int kUnits = kLatent / 32;  // of 16 rows
__host__ __device__ constexpr int part_elements(int row_groups) {
  return kFactorElements + row_groups * kUnits * kUnitElements;
}
// Parts are counted by CTAs, two for each.
__device__ __forceinline__ uint4* part_at(const Params& params, int index) {
  return reinterpret_cast<uint4*>(params.partial) + index * part_elements(params.row_groups);
}

// A warp's accumulators of `set`, kChunks chunks of 8 columns.
template <int kChunks>
__device__ __forceinline__ void store_partial(const Params& params, int index, int set, int lane,
                                              const float (&o)[4 * kChunks]) {
  uint4* part = part_at(params, index);
  uint4* units = part + kFactorElements + set * (kChunks / 2 * 32) + lane;
  const float2 factors = pack_rows<kChunks>(o, [&](int i, const uint4& packed) { units[i * 32] = packed; });
  if ((lane & 3) == 0) reinterpret_cast<float2*>(part)[set * 8 + lane / 4] = factors;
}

// Items without tokens: output 0, lse +inf.
template <typename T, int kThreads = 256>
__device__ __forceinline__ void store_empty_item(const Params& params, const RowTable& table, int item, int thread) {
#pragma unroll 1
  for (int index = thread; index < kTileRows * (kLatent / 8); index += kThreads) {
    const int row = index / (kLatent / 8);
    const int column = index % (kLatent / 8);
    const int64_t offset = table.out[row];
    if (offset < 0) break;
    T* destination = static_cast<T*>(params.out) + item * params.out_stride_batch + offset;
    reinterpret_cast<uint4*>(destination)[column] = make_uint4(0, 0, 0, 0);
    if (column == 0) store_lse(params, table, item, row, 0.f, 0.f);
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_EPILOGUE_CUH_
