// The C ABI of the MLA decode operator, shared by every compiled target (cpu, hopper).
//
// One library exports the four functions below and depends on nothing of Python or torch. The operator, for every
// batch row b, query i < s_q and head h (absorbed form of DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
//   n(b, i)   = causal ? cache_seqlens[b] - s_q + 1 + i : cache_seqlens[b]
//   score[t]  = softmax_scale * dot(q[b, i, h, :], cache[t, :])            t < n(b, i)
//   out       = sum_t softmax(score)[t] * cache[t, :kv_lora_rank]          lse = log(sum_t exp(score[t]))
// where cache[t] is token t % page_size of page block_table[b, t / page_size].
// A row with n <= 0 gives out = 0 and lse = +inf. Tokens at or past n are never used, so their memory may hold NaN.
#ifndef MLA_DECODE_H_
#define MLA_DECODE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MLA_DECODE_ABI_VERSION 1

#if defined(__GNUC__)
#define MLA_DECODE_EXPORT __attribute__((visibility("default")))
#else
#define MLA_DECODE_EXPORT
#endif

enum mla_status {
  MLA_OK = 0,
  MLA_ERROR_INVALID_ARGUMENT = 1,  // an argument contradicts the contract; the message names it and its value
  MLA_ERROR_UNSUPPORTED = 2,       // a valid problem that this target or machine cannot run
  MLA_ERROR_RUNTIME = 3            // the launch itself failed
};

enum mla_dtype {
  MLA_DTYPE_FLOAT32 = 0,
  MLA_DTYPE_BFLOAT16 = 1,
  MLA_DTYPE_FLOAT16 = 2,
  // 656 bytes a token: 512 e4m3 latents, 4 float32 scales (one for each 128 latents), 64 bfloat16 rope values.
  MLA_DTYPE_FP8_DS_MLA = 3
};

// All strides count elements of the tensor's dtype (bytes for FP8_DS_MLA); the innermost dimension is contiguous.
typedef struct mla_decode_params {
  uint32_t struct_bytes;  // sizeof(mla_decode_params) of the caller; another size is refused
  int32_t q_dtype;        // enum mla_dtype; out has the same
  int32_t kv_dtype;       // enum mla_dtype
  int32_t batch;
  int32_t s_q;
  int32_t h_q;
  int32_t kv_lora_rank;   // also head_dim_v
  int32_t rope_dim;       // q and cache hold kv_lora_rank + rope_dim values a row
  int32_t num_blocks;
  int32_t page_size;
  int32_t max_blocks_per_seq;
  int32_t causal;         // 0 or 1
  float softmax_scale;
  int32_t num_splits;     // parts of the cache a row is split into; 0 lets the library choose
  int32_t num_threads;    // cpu only; 0 takes OpenMP's default
  int32_t reserved;       // 0

  const void* q;                 // [batch, s_q, h_q, kv_lora_rank + rope_dim]
  int64_t q_stride_batch;
  int64_t q_stride_seq;
  int64_t q_stride_head;
  const void* kv_cache;          // [num_blocks, page_size, 1, kv_lora_rank + rope_dim]
  int64_t kv_stride_block;
  int64_t kv_stride_token;
  const int32_t* block_table;    // [batch, max_blocks_per_seq]
  int64_t block_table_stride;
  const int32_t* cache_seqlens;  // [batch]
  void* out;                     // [batch, s_q, h_q, kv_lora_rank]
  int64_t out_stride_batch;
  int64_t out_stride_seq;
  int64_t out_stride_head;
  float* lse;                    // [batch, h_q, s_q], contiguous
  // mla_decode_workspace_bytes() bytes, 256-byte aligned, for one run at a time. A GPU target keeps its counters
  // within the first 4096 bytes: zero these once, before the first use; every run leaves its counters zero. The rest
  // needs no initial contents.
  void* workspace;
  uint64_t workspace_bytes;
  void* stream;                  // cudaStream_t of a GPU target; NULL on the cpu
} mla_decode_params;

// MLA_DECODE_ABI_VERSION of the library.
MLA_DECODE_EXPORT uint32_t mla_decode_abi_version(void);

// Name of the target: "cpu" or "hopper".
MLA_DECODE_EXPORT const char* mla_decode_target(void);

// Bytes of workspace that mla_decode_run needs for this shape; reads only the scalar fields, never the lengths.
MLA_DECODE_EXPORT uint64_t mla_decode_workspace_bytes(const mla_decode_params* params);

// Runs (cpu) or enqueues on params->stream (GPU) the operator. Returns enum mla_status; on failure writes a message of
// at most error_bytes characters, NUL included, to error and launches nothing.
MLA_DECODE_EXPORT int32_t mla_decode_run(const mla_decode_params* params, char* error, size_t error_bytes);

#ifdef __cplusplus
}
#endif
#endif  // MLA_DECODE_H_
