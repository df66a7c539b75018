// From accumulators to memory: finished rows to the caller's output, parts of split items to the workspace.
#ifndef MLA_HOPPER_EPILOGUE_CUH_
#define MLA_HOPPER_EPILOGUE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.cuh"
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
  const int flat = m_tile * kTileRows + row;
  const int seq = flat / params.h_q;
  const int head = flat - seq * params.h_q;
  const bool valid = flat < params.rows;
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

// A quad of lanes holds 8 columns as 4 words for each of 4 chunks; afterwards lane i of it holds all of chunk i.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
  const bool odd = lane & 1;
  const bool high = lane & 2;
  const uint32_t keep0 = odd ? word[1] : word[0], keep1 = odd ? word[3] : word[2];
  const uint32_t got0 = __shfl_xor_sync(0xFFFFFFFFu, odd ? word[0] : word[1], 1);
  const uint32_t got1 = __shfl_xor_sync(0xFFFFFFFFu, odd ? word[2] : word[3], 1);
  // Now (even word, odd word) of chunk (lane & 1) and of chunk 2 + (lane & 1).
  const uint32_t a0 = odd ? got0 : keep0, a1 = odd ? keep0 : got0;
  const uint32_t b0 = odd ? got1 : keep1, b1 = odd ? keep1 : got1;
  const uint32_t keep_x = high ? b0 : a0, keep_y = high ? b1 : a1;
  const uint32_t got_x = __shfl_xor_sync(0xFFFFFFFFu, high ? a0 : b0, 2);
  const uint32_t got_y = __shfl_xor_sync(0xFFFFFFFFu, high ? a1 : b1, 2);
  word[0] = high ? got_x : keep_x;
  word[1] = high ? got_y : keep_y;
  word[2] = high ? keep_x : got_x;
  word[3] = high ? keep_y : got_y;
}

// Four chunks of 8 columns from `column` on of rows `row` and `row + 8`, as fragments: lane holds 2 columns of each.
template <typename T>
__device__ __forceinline__ void store_chunks(const RowTable& table, T* item_out, int row, int column, int lane,
                                             const float4 (&value)[4]) {
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = upper ? pack(value[i].z, value[i].w, T()) : pack(value[i].x, value[i].y, T());
    }
    transpose_quad(word, lane);
    const int64_t offset = table.out[row + 8 * upper];
    if (offset >= 0) {
      *reinterpret_cast<uint4*>(item_out + offset + column + 8 * (lane & 3)) =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

template <typename T>
__device__ __forceinline__ T* item_output(const Params& params, int item) {
  return static_cast<T*>(params.out) + item * params.out_stride_batch;
}

// Stores this thread's share of a finished tile: scale[0] for row `row`, scale[1] for row + 8.
template <typename T>
__device__ __forceinline__ void store_output(const Params& params, const RowTable& table, int item, int warp, int row,
                                             int half, int lane, const float (&o)[128], const float (&scale)[2]) {
  if (warp >= params.row_groups) return;
  T* item_out = item_output<T>(params, item);
#pragma unroll
  for (int chunk = 0; chunk < 32; chunk += 4) {
    float4 value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int base = 4 * (chunk + i);
      value[i] = make_float4(o[base] * scale[0], o[base + 1] * scale[0], o[base + 2] * scale[1], o[base + 3] * scale[1]);
    }
    store_chunks(table, item_out, row, half * 256 + 8 * chunk, lane, value);
  }
}

// Float4 elements of one partial result, and where part `slot` of a CTA begins.
__device__ __forceinline__ int slot_elements(const Params& params) { return params.row_groups * (2 * 32 * 32); }

__device__ __forceinline__ void store_partial(const Params& params, int cta, int slot, int warp, int half, int lane,
                                              const float (&o)[128]) {
  if (warp >= params.row_groups) return;
  float4* destination = params.partial + (2 * cta + slot) * slot_elements(params) + (warp * 2 + half) * (32 * 32) + lane;
#pragma unroll
  for (int chunk = 0; chunk < 32; ++chunk) {
    destination[chunk * 32] = make_float4(o[4 * chunk], o[4 * chunk + 1], o[4 * chunk + 2], o[4 * chunk + 3]);
  }
}

// Items without tokens: output 0, lse +inf. 256 threads.
template <typename T>
__device__ __forceinline__ void store_empty_item(const Params& params, const RowTable& table, int item, int thread) {
#pragma unroll 1
  for (int index = thread; index < kTileRows * (kLatent / 8); index += 256) {
    const int row = index / (kLatent / 8);
    const int column = index % (kLatent / 8);
    const int64_t offset = table.out[row];
    if (offset < 0) break;
    reinterpret_cast<uint4*>(item_output<T>(params, item) + offset)[column] = make_uint4(0, 0, 0, 0);
    if (column == 0) store_lse(params, table, item, row, 0.f, 0.f);
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_EPILOGUE_CUH_
