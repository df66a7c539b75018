// What a call of the C ABI may ask of the Hopper target: each refusal names the argument and both values.
#ifndef MLA_HOPPER_ARGUMENTS_H_
#define MLA_HOPPER_ARGUMENTS_H_

#include "device.h"
#include "failure.h"
#include "launch_choice.cuh"
#include "mla_decode.h"
#include "params.cuh"

namespace mla_hopper {

using mla::Failure;

inline const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case MLA_DTYPE_FLOAT32: return "float32";
    case MLA_DTYPE_BFLOAT16: return "bfloat16";
    case MLA_DTYPE_FLOAT16: return "float16";
    case MLA_DTYPE_FP8_DS_MLA: return "fp8_ds_mla";
    default: return "unknown";
  }
}

inline bool misaligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; }

inline int32_t check(const mla_decode_params& p, const Device& device, const Failure& fail) {
  if (p.batch < 0 || p.s_q < 1 || p.h_q < 1 || p.num_blocks < 0 || p.max_blocks_per_seq < 0) {
    return fail(MLA_ERROR_INVALID_ARGUMENT,
                "sizes must be positive: batch=%d, s_q=%d, h_q=%d, num_blocks=%d, max_blocks_per_seq=%d", p.batch, p.s_q,
                p.h_q, p.num_blocks, p.max_blocks_per_seq);
  }
  if (p.kv_lora_rank != kLatent || p.rope_dim != kRope) {
    return fail(MLA_ERROR_UNSUPPORTED, "kv_lora_rank=%d and rope_dim=%d: the hopper target takes 512 and 64 only",
                p.kv_lora_rank, p.rope_dim);
  }
  if (p.page_size != kTileTokens) {
    return fail(MLA_ERROR_UNSUPPORTED, "page_size=%d: the hopper target takes 64 only", p.page_size);
  }
  if (p.q_dtype != MLA_DTYPE_BFLOAT16 && p.q_dtype != MLA_DTYPE_FLOAT16) {
    return fail(MLA_ERROR_UNSUPPORTED, "q_dtype is %s (%d): the hopper target takes bfloat16 and float16",
                dtype_name(p.q_dtype), p.q_dtype);
  }
  const bool fp8 = p.kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  if (fp8 ? p.q_dtype != MLA_DTYPE_BFLOAT16 : p.kv_dtype != p.q_dtype) {
    return fail(MLA_ERROR_UNSUPPORTED,
                "kv_dtype is %s (%d) and q_dtype %s (%d): the hopper target takes equal ones, or fp8_ds_mla with bfloat16",
                dtype_name(p.kv_dtype), p.kv_dtype, dtype_name(p.q_dtype), p.q_dtype);
  }
  if (fp8 && p.kv_stride_token != kTokenBytesFp8) {
    return fail(MLA_ERROR_UNSUPPORTED, "kv_stride_token=%lld bytes: the hopper target needs the %d of packed fp8 tokens",
                static_cast<long long>(p.kv_stride_token), kTokenBytesFp8);
  }
  if (p.num_splits != 0) {
    return fail(MLA_ERROR_UNSUPPORTED, "num_splits=%d: the hopper target chooses the splits itself, pass 0", p.num_splits);
  }
  struct {
    const char* name;
    const void* pointer;
    uintptr_t bytes;
  } const pointers[] = {{"q", p.q, 16},
                        {"kv_cache", p.kv_cache, 16},
                        {"block_table", p.block_table, 4},
                        {"cache_seqlens", p.cache_seqlens, 4},
                        {"out", p.out, 16},
                        {"lse", p.lse, 4},
                        {"workspace", p.workspace, 256}};
  for (const auto& item : pointers) {
    if (item.pointer == nullptr) return fail(MLA_ERROR_INVALID_ARGUMENT, "%s is null", item.name);
    if (misaligned(item.pointer, item.bytes)) {
      return fail(MLA_ERROR_INVALID_ARGUMENT, "%s=%p is not aligned to %d bytes", item.name, item.pointer, int(item.bytes));
    }
  }
  struct {
    const char* name;
    int64_t value;
    int64_t least;
  } const strides[] = {{"q_stride_batch", p.q_stride_batch, 0},
                       {"q_stride_seq", p.q_stride_seq, 0},
                       {"q_stride_head", p.q_stride_head, 0},
                       {"kv_stride_token", p.kv_stride_token, fp8 ? 0 : kDim},
                       {"kv_stride_block", p.kv_stride_block / (fp8 ? 2 : 1), 0},
                       {"out_stride_batch", p.out_stride_batch, 0},
                       {"out_stride_seq", p.out_stride_seq, 0},
                       {"out_stride_head", p.out_stride_head, 0}};
  for (const auto& item : strides) {
    if (item.value < item.least || item.value % 8 != 0) {
      return fail(MLA_ERROR_INVALID_ARGUMENT, "%s=%lld elements must be at least %lld and a multiple of 16 bytes",
                  item.name, static_cast<long long>(item.value), static_cast<long long>(item.least));
    }
  }
  if (p.s_q > 1 && p.h_q > 1 && p.q_stride_seq != p.h_q * p.q_stride_head) {
    return fail(MLA_ERROR_UNSUPPORTED,
                "q_stride_seq=%lld is not h_q * q_stride_head = %lld: the hopper target takes queries and heads as one "
                "dimension; pass a contiguous q",
                static_cast<long long>(p.q_stride_seq), static_cast<long long>(p.h_q * p.q_stride_head));
  }
  if (device.error != cudaSuccess) {
    return fail(MLA_ERROR_RUNTIME, "no CUDA device: %s", cudaGetErrorString(device.error));
  }
  if (device.major != 9 || device.minor != 0) {
    return fail(MLA_ERROR_UNSUPPORTED,
                "device %d has compute capability %d.%d; this library is built for 9.0 (H100, H200, GH200)", device.index,
                device.major, device.minor);
  }
  if (row_tiles(p, device.ctas).count > device.ctas) {
    return fail(MLA_ERROR_UNSUPPORTED, "s_q * h_q = %d * %d is more than the %d query rows one launch can hold", p.s_q,
                p.h_q, device.ctas * kTileRows);
  }
  const uint64_t needed = mla_decode_workspace_bytes(&p);
  if (p.workspace_bytes < needed) {
    return fail(MLA_ERROR_INVALID_ARGUMENT, "workspace_bytes=%llu is less than the %llu this shape needs",
                static_cast<unsigned long long>(p.workspace_bytes), static_cast<unsigned long long>(needed));
  }
  return MLA_OK;
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_ARGUMENTS_H_
