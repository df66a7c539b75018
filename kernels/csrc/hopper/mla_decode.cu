// The C ABI (mla_decode.h) on top of the Hopper kernel: checks, tensor map, workspace layout, launch.
#include "mla_decode.h"

#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>

#include "ring_kernel.cuh"
#include "narrow.cuh"
#include "tables.h"

namespace {

using namespace mla_hopper;

constexpr int kDefaultCtas = 132;
constexpr int kDevices = 64;    // about which things are remembered
constexpr int kMostCluster = 8;  // CTAs; more would not run everywhere
constexpr uint64_t kCounterBytes = 2 * kMaxCtas * sizeof(uint32_t);

class Failure {
 public:
  Failure(char* text, size_t bytes) : text_(text), bytes_(bytes) {}
  int32_t operator()(int32_t status, const char* format, ...) const __attribute__((format(printf, 3, 4))) {
    if (text_ != nullptr && bytes_ > 0) {
      va_list arguments;
      va_start(arguments, format);
      vsnprintf(text_, bytes_, format, arguments);
      va_end(arguments);
    }
    return status;
  }

 private:
  char* text_;
  size_t bytes_;
};

struct Device {
  int index = -1;
  int ctas = kDefaultCtas;
  int major = 0, minor = 0;
  cudaError_t error = cudaSuccess;
};

// The current device; attributes are asked once for each device.
Device current_device() {
  static Device known[kDevices];
  Device device;
  device.error = cudaGetDevice(&device.index);
  if (device.error != cudaSuccess || device.index >= kDevices) return device;
  Device& cached = known[device.index];
  if (cached.index < 0) {
    cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, device.index);
    cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, device.index);
    device.error = cudaDeviceGetAttribute(&device.ctas, cudaDevAttrMultiProcessorCount, device.index);
    if (device.error != cudaSuccess) return device;
    device.ctas = std::min(device.ctas, kMaxCtas);
    cached = device;
  }
  return cached;
}

int ceil_div(int64_t value, int divisor) { return static_cast<int>((value + divisor - 1) / divisor); }

// A number that was measured (NOTES_hopper.md); a build with MLA_HOPPER_TUNING takes it from the environment.
int tuned(const char* variable, int value) {
#ifdef MLA_HOPPER_TUNING
  if (const char* text = getenv(variable)) return atoi(text);
#endif
  (void)variable;
  return value;
}

// How the query rows of an item are dealt to CTAs.
struct RowTiles {
  int rows;    // of a CTA at most
  int count;   // CTAs that have the item's rows and read the same cache
  int groups;  // of 16 rows, of a CTA: ceil(min(all rows, rows) / 16)
};

// With 16 rows a CTA, more CTAs share the work, and what each leaves to be merged is a quarter as large; but each of them
// goes through the tiles that one could have taken with 64 rows. So it pays while none has many tiles or several items
// (NOTES_hopper.md). Two CTAs that share a 16-bit cache's tiles keep up with memory, however many.
RowTiles row_tiles(const mla_decode_params& p, int ctas) {
  const int rows = p.s_q * p.h_q;
  const int narrow = ceil_div(rows, kNarrowRows);
  if (narrow <= 1) return {kNarrowRows, 1, 1};
  if (narrow <= ctas && p.batch <= ctas / narrow) {
    const int tiles = ceil_div(int64_t(p.batch) * p.max_blocks_per_seq, ctas / narrow);  // of a CTA at most
    const bool fast = narrow == 2 && p.kv_dtype != MLA_DTYPE_FP8_DS_MLA;
    const int most = fast ? 512 : 40 / std::min(narrow, 4);
    if (tiles <= tuned("MLA_HOPPER_NARROW_TILES", most)) return {kNarrowRows, narrow, 1};
  }
  return {kTileRows, ceil_div(rows, kTileRows), ceil_div(std::min(rows, kTileRows), 16)};
}

uint64_t align(uint64_t bytes) { return (bytes + 255) / 256 * 256; }
uint64_t stats_bytes(int ctas) { return align(uint64_t(ctas) * 2 * 64 * sizeof(float2)); }
uint64_t partial_bytes(int ctas, int groups) { return uint64_t(ctas) * 2 * groups * (2 * 32 * 32 * sizeof(float4)); }

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case MLA_DTYPE_FLOAT32: return "float32";
    case MLA_DTYPE_BFLOAT16: return "bfloat16";
    case MLA_DTYPE_FLOAT16: return "float16";
    case MLA_DTYPE_FP8_DS_MLA: return "fp8_ds_mla";
    default: return "unknown";
  }
}

bool misaligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; }

int32_t check(const mla_decode_params& p, const Device& device, const Failure& fail) {
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

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that the library links against no driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      pointer = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(pointer);
  }();
  return function;
}

// A map of a [z, y, 512 + 64] tensor of 16-bit elements whose boxes are [1, rows, 64], swizzled as wgmma reads them.
// Strides count elements; y past its size reads as zeros.
int32_t make_map(CUtensorMap* map, const char* name, int32_t dtype, const void* data, int y, int64_t y_stride, int z,
                 int64_t z_stride, int rows, const Failure& fail) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) {
    return fail(MLA_ERROR_RUNTIME, "the CUDA driver has no cuTensorMapEncodeTiled; it is older than 12.0");
  }
  const CUtensorMapDataType type =
      dtype == MLA_DTYPE_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // A dimension of size 1 may come with any stride, and an empty pool is never read: keep the map valid.
  const cuuint64_t size[3] = {kDim, static_cast<cuuint64_t>(y), static_cast<cuuint64_t>(std::max(z, 1))};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(y > 1 ? y_stride * 2 : kDim * 2),
                                static_cast<cuuint64_t>(z > 1 ? z_stride * 2 : kDim * 2)};
  const cuuint32_t box[3] = {kColumns, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t step[3] = {1, 1, 1};
  const CUresult result =
      encode(map, type, 3, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return fail(MLA_ERROR_INVALID_ARGUMENT,
                "%s=%p of shape [%d, %d, %d] with strides %lld and %lld: the driver refuses a tensor map (CUresult %d)",
                name, data, z, y, kDim, static_cast<long long>(z_stride), static_cast<long long>(y_stride),
                static_cast<int>(result));
  }
  return MLA_OK;
}

struct Variant {
  void (*function)(const Params, const CUtensorMap, const CUtensorMap);
  int threads, shared_bytes;
  int copied_tokens;  // of one bulk tensor copy from a 16-bit cache
  int cluster = 1;    // CTAs
};

template <typename T, typename L, bool kMany>
Variant ring() {
  return {mla_decode_ring_kernel<T, L, kMany>, L::kThreads, L::kBytes, kTileTokens};
}
template <typename T>
Variant ring(bool many_parts) {
  return many_parts ? ring<T, RingLayout, true>() : ring<T, RingLayout, false>();
}

template <typename Operands, int kCtas>
Variant narrow_cluster() {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  return {mla_decode_narrow_kernel<Operands, kCtas>, L::kThreads, L::kRequest, Operands::kStepTokens, kCtas};
}

template <typename Operands>
Variant narrow(int cluster) {
  switch (cluster) {
    case 2: return narrow_cluster<Operands, 2>();
    case 4: return narrow_cluster<Operands, 4>();
    case 8: return narrow_cluster<Operands, 8>();
    default: return narrow_cluster<Operands, 1>();
  }
}

Variant choose(int32_t q_dtype, bool fp8, bool few_rows, int cluster, bool many_parts) {
  if (fp8) return few_rows ? narrow<NarrowFp8>(cluster) : ring<__nv_bfloat16, RingFp8Layout, false>();
  if (q_dtype == MLA_DTYPE_BFLOAT16) {
    return few_rows ? narrow<Narrow16bit<__nv_bfloat16>>(cluster) : ring<__nv_bfloat16>(many_parts);
  }
  return few_rows ? narrow<Narrow16bit<__half>>(cluster) : ring<__half>(many_parts);
}

// CTAs that share an item's tiles and merge through each other's shared memory, and how many such clusters fit on the
// device at once: fewer than multiprocessors would make, whose groups have different sizes.
struct Clusters {
  int size, count;
};

template <int kCtas>
int count_clusters() {
  using L = NarrowLayout<Narrow16bit<__half>::kStepBytes, kCtas>;
  const auto kernel = mla_decode_narrow_kernel<Narrow16bit<__half>, kCtas>;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCtas, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kCtas);
  config.blockDim = dim3(L::kThreads);
  config.dynamicSmemBytes = L::kRequest;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kRequest);
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// The same, asked once for each device.
int clusters_at_once(const Device& device, int size) {
  static int known[kDevices][kMostCluster + 1];  // 1 more than the number, 0: not asked yet
  if (device.index >= kDevices) return 0;
  int& count = known[device.index][size];
  if (count == 0) count = 1 + (size == 8 ? count_clusters<8>() : size == 4 ? count_clusters<4>() : count_clusters<2>());
  return count - 1;
}

// The fewest tiles of an item that are worth a second cluster.
int least_tiles(int cluster) { return cluster == 1 ? 1 : (cluster == 2 ? 8 : 16); }

// The largest clusters of which each item's rows get one, or several. Clusters merge sooner, but leave multiprocessors idle
// and have fewer tiles on their way to each, so that they pay (NOTES_hopper.md) when one takes an item as a whole, or when
// those of 8 are evenly shared and no CTA has many tiles.
Clusters choose_clusters(const mla_decode_params& p, const RowTiles& tiles, const Device& device) {
  const Clusters none = {1, device.ctas};
  if (tiles.rows != kNarrowRows) return none;
  for (int size = tuned("MLA_HOPPER_CLUSTER", kMostCluster); size > 1; size /= 2) {
    const Clusters clusters = {size, clusters_at_once(device, size)};
    const int groups = clusters.count / tiles.count;
    const int each = groups / p.batch;
    if (each == 0) continue;
    const int most = p.max_blocks_per_seq - 1;  // pages of an item: callers' tables have a column to spare
    const bool whole = most <= least_tiles(size) && (size > 2 || each == 1 || tiles.count == 1);
    const bool even = size == 8 && 10 * each * p.batch >= 9 * groups && most <= 5 * size * each;
    return whole || even ? clusters : none;
  }
  return none;
}

Params kernel_params(const mla_decode_params& p, const RowTiles& tiles, const Clusters& clusters, int ctas) {
  Params k = {};
  k.batch = p.batch;
  k.s_q = p.s_q;
  k.h_q = p.h_q;
  k.rows = p.s_q * p.h_q;
  k.m_tiles = tiles.count;
  k.groups = clusters.count / k.m_tiles;
  k.row_groups = tiles.groups;
  k.most_parts = tuned("MLA_HOPPER_MOST_PARTS", k.row_groups == 1 ? 96 : (k.row_groups == 2 ? 48 : 24));
  k.min_tiles = tuned("MLA_HOPPER_MIN_TILES", least_tiles(clusters.size));
  k.split_cost = tuned("MLA_HOPPER_SPLIT_COST", 8);
  // Half of the multiprocessors keep up with memory where a tile is read once, if it need not be unpacked.
  const bool ring = tiles.rows == kTileRows && p.kv_dtype != MLA_DTYPE_FP8_DS_MLA;
  k.half_below = tuned("MLA_HOPPER_HALF_BELOW", ring && k.m_tiles == 1 ? 1536 : 0);
  k.whole_below = tuned("MLA_HOPPER_WHOLE_BELOW", ring ? (k.m_tiles == 1 ? 64 : 8) : (k.m_tiles == 1 && clusters.size == 1 ? 16 : 0));
  k.causal = p.causal;
  k.max_length = static_cast<int>(std::min<int64_t>(int64_t(p.max_blocks_per_seq) * kTileTokens, 1 << 30));
  k.negative = p.softmax_scale < 0.f;
  // Never 0, so that a masked score of -inf stays one.
  k.scale_log2 = std::max(static_cast<float>(std::abs(double(p.softmax_scale)) * 1.4426950408889634), 1e-30f);
  if (p.kv_dtype == MLA_DTYPE_FP8_DS_MLA) {
    k.raw_cache = static_cast<const uint8_t*>(p.kv_cache);
    k.raw_stride = p.kv_stride_block;
  }
  k.block_table = p.block_table;
  k.block_table_stride = p.block_table_stride;
  k.lengths = p.cache_seqlens;
  k.out = p.out;
  k.out_stride_batch = p.out_stride_batch;
  k.out_stride_seq = p.out_stride_seq;
  k.out_stride_head = p.out_stride_head;
  k.lse = p.lse;
  char* workspace = static_cast<char*>(p.workspace);
  k.arrived = reinterpret_cast<uint32_t*>(workspace);
  k.finished = k.arrived + kMaxCtas;
  k.stats = reinterpret_cast<float2*>(workspace + kCounterBytes);
  k.partial = reinterpret_cast<float4*>(workspace + kCounterBytes + stats_bytes(ctas));
#ifdef MLA_HOPPER_TRACE
  k.trace = reinterpret_cast<long long*>(reinterpret_cast<char*>(k.partial) + partial_bytes(ctas, k.row_groups));
#endif
  return k;
}

}  // namespace

uint32_t mla_decode_abi_version(void) { return MLA_DECODE_ABI_VERSION; }

const char* mla_decode_target(void) { return "hopper"; }

uint64_t mla_decode_workspace_bytes(const mla_decode_params* params) {
  if (params == nullptr || params->struct_bytes != sizeof(mla_decode_params)) return 0;
  const int ctas = current_device().ctas;
  uint64_t bytes = kCounterBytes + stats_bytes(ctas) + partial_bytes(ctas, row_tiles(*params, ctas).groups);
#ifdef MLA_HOPPER_TRACE
  bytes += uint64_t(ctas) * 32 * sizeof(long long);
#endif
  return bytes;
}

int32_t mla_decode_run(const mla_decode_params* params, char* error, size_t error_bytes) {
  const Failure fail(error, error_bytes);
  if (params == nullptr) return fail(MLA_ERROR_INVALID_ARGUMENT, "params is null");
  if (params->struct_bytes != sizeof(mla_decode_params)) {
    return fail(MLA_ERROR_INVALID_ARGUMENT, "params->struct_bytes=%u, the library's mla_decode_params has %u",
                params->struct_bytes, static_cast<unsigned>(sizeof(mla_decode_params)));
  }
  const mla_decode_params& p = *params;
  if (p.batch == 0) return MLA_OK;
  const Device device = current_device();
  int32_t status = check(p, device, fail);
  if (status == MLA_OK) status = check_tables(p, fail);
  if (status != MLA_OK) return status;
  const RowTiles tiles = row_tiles(p, device.ctas);
  const Clusters clusters = choose_clusters(p, tiles, device);
  const Params kernel = kernel_params(p, tiles, clusters, device.ctas);
  CUtensorMap query_map, cache_map = {};
  status = make_map(&query_map, "q", p.q_dtype, p.q, kernel.rows, p.h_q > 1 ? p.q_stride_head : p.q_stride_seq, p.batch,
                    p.q_stride_batch, kernel.row_groups * 16, fail);
  if (status != MLA_OK) return status;
  const bool fp8 = p.kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  const bool many_parts = p.batch * kManyParts <= kernel.groups;
  const Variant variant = choose(p.q_dtype, fp8, tiles.rows == kNarrowRows, clusters.size, many_parts);
  if (!fp8) {
    status = make_map(&cache_map, "kv_cache", p.kv_dtype, p.kv_cache, kTileTokens, p.kv_stride_token, p.num_blocks,
                      p.kv_stride_block, variant.copied_tokens, fail);
    if (status != MLA_OK) return status;
  }

  cudaError_t result = cudaFuncSetAttribute(reinterpret_cast<const void*>(variant.function),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes);
  cudaLaunchAttribute attribute = {};
  if (variant.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = variant.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const int ctas = variant.cluster > 1 ? kernel.groups * kernel.m_tiles * variant.cluster : device.ctas;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(variant.threads);
  config.dynamicSmemBytes = variant.shared_bytes;
  config.stream = static_cast<cudaStream_t>(p.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (result == cudaSuccess) result = cudaLaunchKernelEx(&config, variant.function, kernel, query_map, cache_map);
  if (result != cudaSuccess) {
    cudaGetLastError();
    return fail(MLA_ERROR_RUNTIME, "launch of %d CTAs with %d bytes of shared memory each failed: %s", ctas,
                variant.shared_bytes, cudaGetErrorString(result));
  }
  return MLA_OK;
}
