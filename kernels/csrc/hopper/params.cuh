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
constexpr int kNarrowRows = 16;          // the same in the kernel for few (narrow.cuh), one mma M
constexpr uint64_t kKeepInL2 = 0x14F0000000000000ull;  // L2 priorities as the copy engine takes them: evict last,
constexpr uint64_t kReadOnce = 0x12F0000000000000ull;  // evict first,
constexpr uint64_t kNormal = 0x1000000000000000ull;    // and neither (values of createpolicy.fractional)
constexpr int kColumns = 64;             // elements of a 128-byte swizzled row
constexpr int kSlabs = kDim / kColumns;  // [64 rows, 64 elements] slabs of a tile
constexpr int kSlabBytes = 64 * kColumns * 2;
constexpr int kMostShared = 232448;      // bytes of shared memory that a CTA can have
constexpr int kMaxCtas = 256;            // counters kept in the workspace

constexpr int kTokenBytesFp8 = 656;   // 512 e4m3, 4 float32 scales, 64 bfloat16
constexpr int kRawTokens = 16;        // tokens of one copy of raw fp8 cache
constexpr int kRawBytes = kRawTokens * kTokenBytesFp8;

struct Params {
  int batch, s_q, h_q;
  int rows;        // s_q * h_q
  int m_tiles;     // CTAs of a group, each with its own query rows
  int groups;
  int shares;      // clusters: CTAs that an item's tiles are dealt to, in one cluster or several
  int min_tiles;   // smallest piece of the tile line a group takes
  int most_parts;  // items of more tiles are not cut into single ones
  int split_cost;  // what splitting an item costs, in tiles
  int whole_below;  // items of so many tiles or fewer, that all groups would take in two parts, half of the groups take whole
  int row_groups;  // 16-row groups kept in a partial result: ceil(min(rows, 64) / 16)
  int causal;
  int max_length;  // tokens the block table can address
  float scale_log2;  // |softmax_scale| * log2(e), not 0
  int negative;      // softmax_scale < 0
  const uint8_t* raw_cache;  // fp8: the cache and the bytes from one page to the next
  int64_t raw_stride;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* lengths;
  void* out;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  float* lse;           // [batch, h_q, s_q]
  uint32_t* arrived;    // [kMaxCtas], zero between launches; in the kernel for few rows [2 kMaxCtas], those of `finished` too
  uint32_t* finished;   // [kMaxCtas], zero between launches
  uint32_t* counted;    // [kMaxCtas], zero between launches
  float2* stats;        // [ctas, 2, 64]: running maximum (log2 units) and denominator of a partial result
#ifdef MLA_HOPPER_TRACE
  long long* trace;  // [ctas, 4, 16]: clock of each warpgroup's first thread when it last came by MLA_TRACE(i)
#endif
  float4* partial;      // [ctas, 2] parts (epilogue.cuh); of clusters [clusters, 2, 64 chunks, 32 lanes], unpacked
};

#ifdef MLA_HOPPER_TRACE
#define MLA_TRACE_IN(params, i) \
  if (threadIdx.x % 128 == 0) (params).trace[(cta_index() * 4 + threadIdx.x / 128) * 16 + (i)] = clock64()
__device__ __forceinline__ int cta_index() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
#else
#define MLA_TRACE_IN(params, i)
#endif
#define MLA_TRACE(i) MLA_TRACE_IN(params, i)

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PARAMS_CUH_
