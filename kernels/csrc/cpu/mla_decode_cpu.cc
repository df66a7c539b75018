// The cpu target: argument checks, partition of the work, and choice of the instruction set.
//
// The cache of every batch row is cut into segments of at most `chunk` tokens, so that few long rows still feed every
// thread (flash-decoding). Segments depend only on the arguments and the thread count, each is computed by one thread
// in a fixed order, and a row's segments are merged in cache order: equal inputs give equal bits.
#include "mla_decode.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/segment.h"
#include "failure.h"

namespace mla {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSegmentsPerThread = 2;  // slack for the dynamic schedule when a core is slow
constexpr int kMinChunk = 64;          // tokens; below, merging costs more than it gains
constexpr int64_t kThreadNs = 30000;   // least work of a thread; waking it and waiting for it costs microseconds
constexpr size_t kAlign = 256;

// Bytes of the unit that strides count.
size_t dtype_bytes(int dtype) {
  return dtype == MLA_DTYPE_FLOAT32 ? 4 : dtype == MLA_DTYPE_FP8_DS_MLA ? 1 : 2;
}
size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int thread_count(const mla_decode_params& p) {
  const int threads = p.num_threads > 0 ? p.num_threads : omp_get_max_threads();
  return threads < kMaxThreads ? threads : kMaxThreads;
}

// Rows of a batch element are handled in groups of at most kGroupRows.
struct Layout {
  int threads, groups, group_rows, max_items, max_slots, acc_stride;
  size_t items, slots, slot_bytes, scratch, scratch_bytes, bytes;
};

struct Item {
  int batch, group, token_begin, token_end;
  int slot;  // where the segment's state is kept for merging; -1: the row has one segment and is stored at once
  int first_slot, num_slots;  // of the row
};

Layout make_layout(const mla_decode_params& p, const Kernel& kernel) {
  Layout l{};
  const int rows = p.s_q * p.h_q;
  l.threads = thread_count(p);
  l.groups = (rows + kGroupRows - 1) / kGroupRows;
  l.group_rows = (rows + l.groups - 1) / l.groups;
  const int64_t parts = p.num_splits > 0 ? (int64_t)p.num_splits * p.batch * l.groups
                                         : (int64_t)2 * kSegmentsPerThread * l.threads;
  l.max_slots = (int)parts;
  l.max_items = p.batch * l.groups + l.max_slots;
  l.acc_stride = kernel.acc_stride(p.kv_lora_rank);
  l.slot_bytes = round_up((size_t)l.group_rows * (l.acc_stride + 2) * sizeof(float), kAlign);
  l.scratch_bytes = round_up(kernel.scratch_bytes(l.group_rows, p.kv_lora_rank + p.rope_dim, p.kv_dtype), kAlign) + l.slot_bytes;
  l.items = 0;
  l.slots = round_up(l.max_items * sizeof(Item), kAlign);
  l.scratch = l.slots + l.max_slots * l.slot_bytes;
  l.bytes = l.scratch + l.threads * l.scratch_bytes;
  return l;
}

State state_at(unsigned char* base, const Layout& l) {
  float* floats = reinterpret_cast<float*>(base);
  const size_t rows = l.group_rows;
  return {floats, floats + rows * l.acc_stride, floats + rows * l.acc_stride + rows};
}

// The largest number of tokens that any query of the batch element sees.
int visible(const mla_decode_params& p, int batch) {
  const int n = p.cache_seqlens[batch];
  return n > 0 ? n : 0;
}

int64_t total_tokens(const mla_decode_params& p) {
  int64_t total = 0;
  for (int b = 0; b < p.batch; ++b) total += visible(p, b);
  return total;
}

// At most l.threads, fewer when each would have less than kThreadNs of work.
int useful_threads(const mla_decode_params& p, const Layout& l, const Kernel& kernel) {
  const int64_t macs = (int64_t)p.s_q * p.h_q * (2 * p.kv_lora_rank + p.rope_dim) * total_tokens(p);
  const int64_t threads = macs / kernel.macs_per_ns / kThreadNs;
  return threads < 1 ? 1 : threads < l.threads ? (int)threads : l.threads;
}

int partition(const mla_decode_params& p, const Layout& l, int threads, Item* items) {
  const int64_t total = total_tokens(p) * l.groups;
  const int64_t wanted = (int64_t)threads * kSegmentsPerThread;
  int64_t chunk = threads == 1 ? (int64_t)1 << 40 : (total + wanted - 1) / wanted;
  if (chunk < kMinChunk) chunk = kMinChunk;
  int count = 0, slots = 0;
  for (int b = 0; b < p.batch; ++b) {
    const int n = visible(p, b);
    int64_t parts = p.num_splits > 0 ? p.num_splits : (n + chunk - 1) / chunk;
    if (parts * kMinChunk > n + kMinChunk - 1) parts = (n + kMinChunk - 1) / kMinChunk;
    if (parts < 1) parts = 1;
    const int step = (int)round_up((n + parts - 1) / parts, kMinChunk);
    parts = n == 0 ? 1 : (n + step - 1) / step;
    for (int g = 0; g < l.groups; ++g) {
      const int first = slots;
      for (int s = 0; s < parts; ++s) {
        const int begin = s * step, end = begin + step < n ? begin + step : n;
        items[count++] = {b, g, begin, end, parts > 1 ? slots++ : -1, first, (int)parts};
      }
    }
  }
  return count;
}

int check(const mla_decode_params* params, char* error, size_t bytes) {
  const Failure fail(error, bytes);
  if (params == nullptr) return fail(MLA_ERROR_INVALID_ARGUMENT, "params is NULL");
  const mla_decode_params& p = *params;
  if (p.struct_bytes != sizeof(mla_decode_params))
    return fail(MLA_ERROR_INVALID_ARGUMENT, "struct_bytes is %u, this library expects %zu", p.struct_bytes,
                sizeof(mla_decode_params));
#define MLA_REQUIRE(condition, ...) \
  if (!(condition)) return fail(MLA_ERROR_INVALID_ARGUMENT, __VA_ARGS__)
  MLA_REQUIRE(p.q_dtype >= MLA_DTYPE_FLOAT32 && p.q_dtype <= MLA_DTYPE_FLOAT16,
              "q_dtype is %d, expected 0 (float32), 1 (bfloat16) or 2 (float16)", p.q_dtype);
  MLA_REQUIRE(p.kv_dtype >= MLA_DTYPE_FLOAT32 && p.kv_dtype <= MLA_DTYPE_FP8_DS_MLA,
              "kv_dtype is %d, expected 0 to 3", p.kv_dtype);
  MLA_REQUIRE(p.batch >= 0 && p.batch <= 1 << 20, "batch is %d, expected 0 to 1048576", p.batch);
  MLA_REQUIRE(p.s_q >= 1 && p.s_q <= 64, "s_q is %d, expected 1 to 64", p.s_q);
  MLA_REQUIRE(p.h_q >= 1 && p.h_q <= 1024, "h_q is %d, expected 1 to 1024", p.h_q);
  MLA_REQUIRE(p.kv_lora_rank >= 16 && p.kv_lora_rank <= 4096 && p.kv_lora_rank % 16 == 0,
              "kv_lora_rank is %d, expected a multiple of 16 from 16 to 4096", p.kv_lora_rank);
  MLA_REQUIRE(p.rope_dim >= 0 && p.rope_dim <= 1024 && p.rope_dim % 16 == 0,
              "rope_dim is %d, expected a multiple of 16 from 0 to 1024", p.rope_dim);
  MLA_REQUIRE(p.kv_dtype != MLA_DTYPE_FP8_DS_MLA || (p.kv_lora_rank == kFp8Rank && p.rope_dim == kFp8Rope),
              "kv_lora_rank, rope_dim are %d, %d, expected 512, 64 for kv_dtype 3 (fp8_ds_mla)", p.kv_lora_rank,
              p.rope_dim);
  MLA_REQUIRE(p.num_blocks >= 0, "num_blocks is %d, expected at least 0", p.num_blocks);
  MLA_REQUIRE(p.page_size >= 1 && p.page_size <= 1 << 20, "page_size is %d, expected 1 to 1048576", p.page_size);
  MLA_REQUIRE(p.max_blocks_per_seq >= 0, "max_blocks_per_seq is %d, expected at least 0", p.max_blocks_per_seq);
  MLA_REQUIRE(p.causal == 0 || p.causal == 1, "causal is %d, expected 0 or 1", p.causal);
  MLA_REQUIRE(p.num_splits >= 0 && p.num_splits <= 256, "num_splits is %d, expected 0 to 256", p.num_splits);
  MLA_REQUIRE(p.num_threads >= 0, "num_threads is %d, expected at least 0", p.num_threads);
  MLA_REQUIRE(p.reserved == 0, "reserved is %d, expected 0", p.reserved);
  return MLA_OK;
}

int check_memory(const mla_decode_params& p, const Layout& l, char* error, size_t bytes) {
  const Failure fail(error, bytes);
  const bool packed = p.kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  const int width = p.kv_lora_rank + p.rope_dim, token = packed ? kFp8TokenBytes : width;
  MLA_REQUIRE(isfinite(p.softmax_scale), "softmax_scale is %g, expected a finite number", (double)p.softmax_scale);
  const struct { const char* name; const void* pointer; size_t align; } pointers[] = {
      {"q", p.q, dtype_bytes(p.q_dtype)},       {"kv_cache", p.kv_cache, packed ? 4 : dtype_bytes(p.kv_dtype)},
      {"block_table", p.block_table, 4},        {"cache_seqlens", p.cache_seqlens, 4},
      {"out", p.out, dtype_bytes(p.q_dtype)},   {"lse", p.lse, 4},
      {"workspace", p.workspace, kAlign},
  };
  for (const auto& entry : pointers) {
    const bool may_be_null = (entry.pointer == p.kv_cache && p.num_blocks == 0) ||
                             (entry.pointer == p.block_table && p.max_blocks_per_seq == 0);
    MLA_REQUIRE(entry.pointer != nullptr || may_be_null, "%s is NULL", entry.name);
    MLA_REQUIRE((uintptr_t)entry.pointer % entry.align == 0, "%s is at %p, expected a multiple of %zu bytes",
                entry.name, entry.pointer, entry.align);
  }
  const struct { const char* name; int64_t stride, least; } strides[] = {
      {"q_stride_head", p.q_stride_head, p.h_q > 1 ? width : 0},      {"q_stride_seq", p.q_stride_seq, 0},
      {"q_stride_batch", p.q_stride_batch, 0},        {"kv_stride_token", p.kv_stride_token, p.page_size > 1 ? token : 0},
      {"kv_stride_block", p.kv_stride_block, p.num_blocks > 1 ? token : 0},
      {"block_table_stride", p.block_table_stride, 0},
      {"out_stride_head", p.out_stride_head, p.h_q > 1 ? p.kv_lora_rank : 0},
      {"out_stride_seq", p.out_stride_seq, p.s_q > 1 ? p.kv_lora_rank : 0},
      {"out_stride_batch", p.out_stride_batch, p.batch > 1 ? p.kv_lora_rank : 0},
  };
  for (const auto& entry : strides)
    MLA_REQUIRE(entry.stride >= entry.least, "%s is %lld, expected at least %lld", entry.name,
                (long long)entry.stride, (long long)entry.least);
  MLA_REQUIRE(p.workspace_bytes >= l.bytes, "workspace_bytes is %llu, this problem needs %zu",
              (unsigned long long)p.workspace_bytes, l.bytes);
  for (int b = 0; b < p.batch; ++b) {
    const int64_t length = p.cache_seqlens[b];
    MLA_REQUIRE(length >= 0 && length <= (int64_t)p.max_blocks_per_seq * p.page_size,
                "cache_seqlens[%d] is %lld, expected 0 to %lld (max_blocks_per_seq * page_size)", b,
                (long long)length, (long long)p.max_blocks_per_seq * p.page_size);
    const int32_t* row = p.block_table + b * p.block_table_stride;
    const int used = (int)((length + p.page_size - 1) / p.page_size);
    for (int i = 0; i < used; ++i)
      MLA_REQUIRE(row[i] >= 0 && row[i] < p.num_blocks, "block_table[%d, %d] is %d, expected 0 to %d (num_blocks - 1)",
                  b, i, row[i], p.num_blocks - 1);
  }
#undef MLA_REQUIRE
  return MLA_OK;
}

void store_rows(const mla_decode_params& p, const Layout& l, const Kernel& kernel, const Item& item,
                const State* parts, int num_parts, int row_begin, int row_end) {
  Output o{};
  o.out = static_cast<unsigned char*>(p.out) + item.batch * p.out_stride_batch * dtype_bytes(p.q_dtype);
  o.stride_seq = p.out_stride_seq;
  o.stride_head = p.out_stride_head;
  o.dtype = p.q_dtype;
  o.lse = p.lse + (int64_t)item.batch * p.h_q * p.s_q;
  o.s_q = p.s_q;
  o.h_q = p.h_q;
  o.rank = p.kv_lora_rank;
  const int group_begin = item.group * l.group_rows;
  for (int row = row_begin; row < row_end; ++row) kernel.store(o, row, row - group_begin, parts, num_parts);
}

void execute(const mla_decode_params& p, const Layout& l, const Kernel& kernel) {
  unsigned char* workspace = static_cast<unsigned char*>(p.workspace);
  Item* items = reinterpret_cast<Item*>(workspace + l.items);
  const int threads = useful_threads(p, l, kernel);
  const int count = partition(p, l, threads, items);
  const int rows = p.s_q * p.h_q;
  bool split = false;
  for (int i = 0; i < count; ++i) split |= items[i].slot >= 0;
  std::atomic<int> next{0}, next_merge{0};

  auto work = [&](int thread) {
    unsigned char* scratch = workspace + l.scratch + thread * l.scratch_bytes;
    for (int i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      const Item& item = items[i];
      Segment s{};
      s.q = static_cast<const unsigned char*>(p.q) + item.batch * p.q_stride_batch * dtype_bytes(p.q_dtype);
      s.q_stride_seq = p.q_stride_seq;
      s.q_stride_head = p.q_stride_head;
      s.cache = static_cast<const unsigned char*>(p.kv_cache);
      s.kv_stride_block = p.kv_stride_block;
      s.kv_stride_token = p.kv_stride_token;
      s.blocks = p.block_table + item.batch * p.block_table_stride;
      s.q_dtype = p.q_dtype;
      s.kv_dtype = p.kv_dtype;
      s.page_size = p.page_size;
      s.s_q = p.s_q;
      s.h_q = p.h_q;
      s.rank = p.kv_lora_rank;
      s.width = p.kv_lora_rank + p.rope_dim;
      s.row_begin = item.group * l.group_rows;
      s.row_end = s.row_begin + l.group_rows < rows ? s.row_begin + l.group_rows : rows;
      s.token_begin = item.token_begin;
      s.token_end = item.token_end;
      s.length = p.cache_seqlens[item.batch];
      s.causal = p.causal != 0;
      s.scale_log2 = p.softmax_scale * 1.44269504088896340736f;
      unsigned char* slot = item.slot >= 0 ? workspace + l.slots + item.slot * l.slot_bytes : scratch;
      const State state = state_at(slot, l);
      kernel.run(s, state, scratch + l.slot_bytes);
      if (item.slot < 0) store_rows(p, l, kernel, item, &state, 1, s.row_begin, s.row_end);
    }
  };
  auto merge = [&] {
    constexpr int kMergeRows = 8;
    const int blocks = (l.group_rows + kMergeRows - 1) / kMergeRows;
    for (;;) {
      const int claim = next_merge.fetch_add(1);
      if (claim >= count * blocks) break;
      const Item& item = items[claim / blocks];
      if (item.slot < 0 || item.slot != item.first_slot) continue;
      State parts[1024];
      for (int s = 0; s < item.num_slots; ++s)
        parts[s] = state_at(workspace + l.slots + (item.first_slot + s) * l.slot_bytes, l);
      const int group_begin = item.group * l.group_rows;
      const int group_end = group_begin + l.group_rows < rows ? group_begin + l.group_rows : rows;
      const int begin = group_begin + claim % blocks * kMergeRows;
      const int end = begin + kMergeRows < group_end ? begin + kMergeRows : group_end;
      store_rows(p, l, kernel, item, parts, item.num_slots, begin, end);
    }
  };
  if (threads == 1 || count == 1) {
    work(0);
    if (split) merge();
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    work(omp_get_thread_num());
    if (split) {
#pragma omp barrier
      merge();
    }
  }
}

}  // namespace
}  // namespace mla

extern "C" {

MLA_DECODE_EXPORT uint32_t mla_decode_abi_version(void) { return MLA_DECODE_ABI_VERSION; }

MLA_DECODE_EXPORT const char* mla_decode_target(void) { return "cpu"; }

MLA_DECODE_EXPORT uint64_t mla_decode_workspace_bytes(const mla_decode_params* params) {
  if (mla::check(params, nullptr, 0) != MLA_OK) return 0;
  return mla::make_layout(*params, mla::best_kernel(params->q_dtype, params->kv_dtype)).bytes;
}

MLA_DECODE_EXPORT int32_t mla_decode_run(const mla_decode_params* params, char* error, size_t error_bytes) {
  int status = mla::check(params, error, error_bytes);
  if (status != MLA_OK || params->batch == 0) return status;
  const mla::Kernel& kernel = mla::best_kernel(params->q_dtype, params->kv_dtype);
  const mla::Layout layout = mla::make_layout(*params, kernel);
  status = mla::check_memory(*params, layout, error, error_bytes);
  if (status != MLA_OK) return status;
  mla::execute(*params, layout, kernel);
  return MLA_OK;
}

}  // extern "C"
