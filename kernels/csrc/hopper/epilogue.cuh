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

// First element of the output row `row` of query tile `m_tile`, or nullptr past the last row.
template <typename T>
__device__ __forceinline__ T* output_row(const Params& params, int item, int m_tile, int row) {
  const int flat = m_tile * kTileRows + row;
  if (flat >= params.rows) return nullptr;
  const int seq = flat / params.h_q;
  const int head = flat - seq * params.h_q;
  return static_cast<T*>(params.out) + item * params.out_stride_batch + seq * params.out_stride_seq +
         head * params.out_stride_head;
}

__device__ __forceinline__ void store_lse(const Params& params, int item, int m_tile, int row, float maximum, float sum) {
  const int flat = m_tile * kTileRows + row;
  if (flat >= params.rows) return;
  const int seq = flat / params.h_q;
  const int head = flat - seq * params.h_q;
  const float lse = sum == 0.f ? INFINITY : (maximum + __log2f(sum)) * kLn2;
  params.lse[(static_cast<int64_t>(item) * params.h_q + head) * params.s_q + seq] = lse;
}

// A quad of lanes holds 8 columns as 4 words for each of 4 chunks; afterwards lane i of it holds all of chunk i.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
  const bool odd = lane & 1;
  const bool high = lane & 2;
  uint32_t keep0 = odd ? word[1] : word[0], send0 = odd ? word[0] : word[1];
  uint32_t keep1 = odd ? word[3] : word[2], send1 = odd ? word[2] : word[3];
  send0 = __shfl_xor_sync(0xFFFFFFFFu, send0, 1);
  send1 = __shfl_xor_sync(0xFFFFFFFFu, send1, 1);
  // Now (even word, odd word) of chunk (lane & 1) and of chunk 2 + (lane & 1).
  const uint32_t a0 = odd ? send0 : keep0, a1 = odd ? keep0 : send0;
  const uint32_t b0 = odd ? send1 : keep1, b1 = odd ? keep1 : send1;
  const uint32_t keep_x = high ? b0 : a0, keep_y = high ? b1 : a1;
  uint32_t send_x = high ? a0 : b0, send_y = high ? a1 : b1;
  send_x = __shfl_xor_sync(0xFFFFFFFFu, send_x, 2);
  send_y = __shfl_xor_sync(0xFFFFFFFFu, send_y, 2);
  word[0] = high ? send_x : keep_x;
  word[1] = high ? send_y : keep_y;
  word[2] = high ? keep_x : send_x;
  word[3] = high ? keep_y : send_y;
}

// Stores this thread's half row pair of a finished tile: scale[0] for row `row`, scale[1] for row + 8.
template <typename T>
__device__ __forceinline__ void store_output(const Params& params, int item, int m_tile, int row, int half, int lane,
                                             const float (&o)[128], const float (&scale)[2]) {
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    T* destination = output_row<T>(params, item, m_tile, row + 8 * upper);
    if (__all_sync(0xFFFFFFFFu, destination == nullptr)) continue;
#pragma unroll
    for (int chunk = 0; chunk < 32; chunk += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int base = 4 * (chunk + i) + 2 * upper;
        word[i] = pack(o[base] * scale[upper], o[base + 1] * scale[upper], T());
      }
      transpose_quad(word, lane);
      if (destination != nullptr) {
        *reinterpret_cast<uint4*>(destination + half * 256 + 8 * (chunk + (lane & 3))) =
            make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

__device__ __forceinline__ float4* partial_slot(const Params& params, int cta, int slot) {
  return params.partial + static_cast<int64_t>(2 * cta + slot) * params.row_groups * (2 * 32 * 32);
}

__device__ __forceinline__ void store_partial(const Params& params, int cta, int slot, int warp, int half, int lane,
                                              const float (&o)[128]) {
  if (warp >= params.row_groups) return;
  float4* destination = partial_slot(params, cta, slot) + (warp * 2 + half) * (32 * 32) + lane;
#pragma unroll
  for (int chunk = 0; chunk < 32; ++chunk) {
    destination[chunk * 32] = make_float4(o[4 * chunk], o[4 * chunk + 1], o[4 * chunk + 2], o[4 * chunk + 3]);
  }
}

// Items without tokens: output 0, lse +inf. 256 threads.
template <typename T>
__device__ __forceinline__ void store_empty_item(const Params& params, int item, int m_tile, int thread) {
#pragma unroll 1
  for (int index = thread; index < kTileRows * (kLatent / 8); index += 256) {
    const int row = index / (kLatent / 8);
    const int column = index % (kLatent / 8);
    T* destination = output_row<T>(params, item, m_tile, row);
    if (destination == nullptr) continue;
    reinterpret_cast<uint4*>(destination)[column] = make_uint4(0, 0, 0, 0);
    if (column == 0) store_lse(params, item, m_tile, row, 0.f, 0.f);
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_EPILOGUE_CUH_
