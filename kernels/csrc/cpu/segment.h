// The seam between the driver (mla_decode_cpu.cc) and the instruction-set kernels: the driver cuts a problem into
// segments, a kernel computes one segment, then stores rows from their finished segments.
#ifndef MLA_CPU_SEGMENT_H_
#define MLA_CPU_SEGMENT_H_

#include <stddef.h>
#include <stdint.h>

namespace mla {

// fp8_ds_mla: a token is 512 e4m3 latents, one float32 scale for each 128 of them, 64 bfloat16 rope values.
constexpr int kFp8Rank = 512, kFp8Rope = 64, kFp8Group = 128, kFp8TokenBytes = 656;

constexpr int kTile = 128;      // cache tokens whose scores are held at once
constexpr int kGroupRows = 128; // query rows that share one pass over the cache

// A group of rows of one batch element (row = query * h_q + head) and a range of its cache.
struct Segment {
  const unsigned char* q;       // q of this batch element
  int64_t q_stride_seq, q_stride_head;  // elements
  const unsigned char* cache;
  int64_t kv_stride_block, kv_stride_token;  // elements of the cache's dtype
  const int32_t* blocks;        // block table of this batch element
  int q_dtype, kv_dtype;        // enum mla_dtype
  int page_size;
  int s_q, h_q, rank, width;    // width = rank + rope
  int row_begin, row_end;
  int token_begin, token_end;
  int length;                   // cache_seqlens of this batch element
  bool causal;
  float scale_log2;             // softmax_scale * log2(e)
};

// Running softmax of a segment: weights are 2^(scaled score - maximum).
struct State {
  float* sum;      // [rows, acc_stride] unnormalised weighted sum of latents, columns in the kernel's own order
  float* maximum;  // [rows] base-2 scaled; -inf while nothing was seen
  float* total;    // [rows] sum of weights
};

struct Output {
  unsigned char* out;  // of this batch element
  int64_t stride_seq, stride_head;  // elements
  int dtype;
  float* lse;          // of this batch element, [h_q, s_q]
  int s_q, h_q, rank;
};

struct Kernel {
  const char* name;
  int macs_per_ns;  // multiply-adds of a core, roughly; decides how many threads a small problem is worth
  // Bytes of a thread's scratch for groups of `rows` rows, and floats of a row of State::sum.
  size_t (*scratch_bytes)(int rows, int width, int kv_dtype);
  int (*acc_stride)(int rank);
  void (*run)(const Segment&, const State&, unsigned char* scratch);
  // Merges `parts` states in order, normalises and writes rows [row, row + 1).
  void (*store)(const Output&, int row, int row_in_group, const State* parts, int num_parts);
};

}  // namespace mla

#endif  // MLA_CPU_SEGMENT_H_
