// Sizes fixed at compile time, and what the host passes to the kernel.
#ifndef MLA_HOPPER_PARAMS_CUH_
#define MLA_HOPPER_PARAMS_CUH_

#include <stdint.h>

namespace mla_hopper {

constexpr int kLatent = 512;             // kv_lora_rank and head_dim_v
constexpr int kRope = 64;
constexpr int kDim = kLatent + kRope;
constexpr int kTileTokens = 64;          // tokens of a tile = tokens of a page
constexpr int kTileRows = 64;            // query rows of a CTA, one wgmma M
constexpr int kStages = 2;
constexpr int kColumns = 64;             // elements of a 128-byte swizzled row
constexpr int kSlabs = kDim / kColumns;  // [64 rows, 64 elements] slabs of a tile
constexpr int kSlabBytes = 64 * kColumns * 2;
constexpr int kTileBytes = kSlabs * kSlabBytes;
constexpr int kThreads = 384;            // two consumer warpgroups and one of producers
constexpr int kMaxCtas = 256;            // counters kept in the workspace

// Byte offsets in dynamic shared memory, whose base is aligned to 1024 (the swizzle's period).
constexpr int kQueryOffset = 0;
constexpr int kCacheOffset = kQueryOffset + kTileBytes;
constexpr int kWeightOffset = kCacheOffset + kStages * kTileBytes;  // softmax weights P, one slab
constexpr int kAlphaOffset = kWeightOffset + kSlabBytes;            // float[64]: factor of the running output
constexpr int kInverseOffset = kAlphaOffset + 64 * 4;               // float[64]: 1 / softmax denominator
constexpr int kBarrierOffset = kInverseOffset + 64 * 4;
constexpr int kSharedBytes = kBarrierOffset + 64;
constexpr int kSharedRequest = kSharedBytes + 1024;  // slack to align the base

struct Params {
  int batch, s_q, h_q;
  int rows;        // s_q * h_q
  int m_tiles;     // CTAs of a group
  int groups;
  int min_tiles;   // smallest piece of the tile line a group takes
  int row_groups;  // 16-row groups kept in a partial result: ceil(min(rows, 64) / 16)
  int causal;
  int max_length;  // tokens the block table can address
  float scale_log2;  // softmax_scale * log2(e)
  uint64_t cache_policy;
  const void* q;
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* lengths;
  void* out;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  float* lse;           // [batch, h_q, s_q]
  uint32_t* arrived;    // [kMaxCtas], zero between launches
  uint32_t* finished;   // [kMaxCtas], zero between launches
  float2* stats;        // [ctas, 2, 64]: running maximum (log2 units) and denominator of a partial result
#ifdef MLA_HOPPER_TRACE
  long long* trace;  // [ctas, 32] clock of thread 0 at MLA_TRACE(i)
#endif
  float4* partial;      // [ctas, 2, row_groups, 2 halves, 32 chunks, 32 lanes]: accumulators in fragment order
};

#ifdef MLA_HOPPER_TRACE
#define MLA_TRACE(i) \
  if (threadIdx.x == 0) params.trace[blockIdx.x * 32 + (i)] = clock64()
#else
#define MLA_TRACE(i)
#endif

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PARAMS_CUH_
