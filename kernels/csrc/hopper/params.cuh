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
constexpr int kTileBytes = kSlabs * kSlabBytes;
constexpr int kMaxCtas = 256;            // counters kept in the workspace

// A stage is filled and emptied in pieces, each as soon as its last reader is done with it, in the order in which they
// become free: the rope slab (read for the scores only), then two latent slabs at a time, of warpgroup 1's output columns
// (slabs 0 to 3) and of warpgroup 2's (slabs 4 to 7) in turn.
constexpr int kPieces = 5;
constexpr int kPieceRope = 0;
__host__ __device__ constexpr int piece_of_values(int half, int pair) { return 1 + 2 * pair + half; }
__host__ __device__ constexpr int first_slab(int piece) {
  return piece == kPieceRope ? 8 : 4 * ((piece - 1) % 2) + 2 * ((piece - 1) / 2);
}
__host__ __device__ constexpr int slab_count(int piece) { return piece == kPieceRope ? 1 : 2; }

constexpr int kTokenBytesFp8 = 656;   // 512 e4m3, 4 float32 scales, 64 bfloat16
constexpr int kRawTokens = 16;        // tokens of one copy of raw fp8 cache
constexpr int kRawBytes = kRawTokens * kTokenBytesFp8;

// Byte offsets in dynamic shared memory, whose base is aligned to 1024 (the swizzle's period), of the kernel for an fp8
// cache and more than 16 query rows (decode.cuh).
struct Layout {
  static constexpr int kRows = kTileRows;
  static constexpr int kUnpackers = 128;            // threads that turn raw tokens into a stage
  static constexpr int kThreads = 384 + kUnpackers;  // warpgroups: scores, two of values, unpacking
  static constexpr int kStages = 1;
  static constexpr int kRawSlots = 7;
  static constexpr int kQuerySlabBytes = kTileRows * kColumns * 2;
  static constexpr int kQuery = 0;
  static constexpr int kCache = kQuery + kSlabs * kQuerySlabBytes;
  static constexpr int kRaw = kCache + kStages * kTileBytes;
  static constexpr int kWeights = (kRaw + kRawSlots * kRawBytes + 1023) / 1024 * 1024;  // softmax weights P, one slab
  static constexpr int kAlpha = kWeights + kSlabBytes;  // float[64]: factor of the running output
  static constexpr int kInverse = kAlpha + 64 * 4;      // float[64]: 1 / softmax denominator
  static constexpr int kOutRows = kInverse + 64 * 4;    // int64[64]: elements from an item's out to the row
  static constexpr int kLseRows = kOutRows + 64 * 8;    // int32[64]: elements from an item's lse to the row
  static constexpr int kSplits = kLseRows + 64 * 4;     // Split[2]
  static constexpr int kBarriers = kSplits + 32;
  static constexpr int kBytes = kBarriers + (2 * kStages * kPieces + 2 + kRawSlots) * 8;
  static constexpr int kRequest = kBytes + 1024;  // slack to align the base
  static_assert(kRequest <= 232448, "more shared memory than a CTA can have");
  static_assert(kCache % 1024 == 0, "stages must be aligned to the swizzle's period");
};

struct Params {
  int batch, s_q, h_q;
  int rows;        // s_q * h_q
  int m_tiles;     // CTAs of a group, each with its own query rows
  int groups;
  int min_tiles;   // smallest piece of the tile line a group takes
  int most_parts;  // items of more tiles are not cut into single ones
  int split_cost;  // what splitting an item costs, in tiles
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
  if (threadIdx.x == 0 || threadIdx.x == 128 || threadIdx.x == 384) params.trace[blockIdx.x * 32 + (i)] = clock64()
#else
#define MLA_TRACE(i)
#endif

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PARAMS_CUH_
