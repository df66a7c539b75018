// The C ABI (mla_decode.h) on top of the Hopper kernel: workspace layout, launch.
#include "mla_decode.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "arguments.h"
#include "launch_choice.cuh"
#include "tables.h"
#include "tensor_map.h"

namespace {

using namespace mla_hopper;

constexpr uint64_t kCounterBytes = 3 * kMaxCtas * sizeof(uint32_t);

uint64_t align(uint64_t bytes) { return (bytes + 255) / 256 * 256; }
uint64_t stats_bytes(int ctas) { return align(uint64_t(ctas) * 2 * 64 * sizeof(float2)); }
// Clusters leave theirs unpacked, but are half as many as CTAs at most.
uint64_t partial_bytes(int ctas, int groups) { return align(uint64_t(ctas) * 2 * part_elements(groups) * sizeof(uint4)); }

Params kernel_params(const mla_decode_params& p, const RowTiles& tiles, const Clusters& clusters, int ctas) {
  Params k = {};
  k.batch = p.batch;
  k.s_q = p.s_q;
  k.h_q = p.h_q;
  k.rows = p.s_q * p.h_q;
  k.m_tiles = tiles.count;
  k.groups = ctas / k.m_tiles;
  k.shares = clusters.size * clusters.each;
  k.row_groups = tiles.groups;
  choose_pieces(k, p, tiles);
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
  k.counted = k.finished + kMaxCtas;
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
  bytes += uint64_t(ctas) * 64 * sizeof(long long);
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
  const Variant variant = choose(p.q_dtype, fp8, tiles.rows == kNarrowRows, clusters.size);
  if (!fp8) {
    status = make_map(&cache_map, "kv_cache", p.kv_dtype, p.kv_cache, kTileTokens, p.kv_stride_token, p.num_blocks,
                      p.kv_stride_block, variant.copied_tokens, fail);
    if (status != MLA_OK) return status;
  }

  cudaError_t result = allow(variant);
  const dim3 grid = variant.cluster > 1 ? dim3(kernel.shares, kernel.m_tiles, kernel.batch) : dim3(device.ctas);
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = launch_config(variant, grid, attribute);
  config.stream = static_cast<cudaStream_t>(p.stream);
  if (result == cudaSuccess) result = cudaLaunchKernelEx(&config, variant.function, kernel, query_map, cache_map);
  if (result != cudaSuccess) {
    cudaGetLastError();
    return fail(MLA_ERROR_RUNTIME, "launch of %u CTAs with %d bytes of shared memory each failed: %s",
                grid.x * grid.y * grid.z, variant.shared_bytes, cudaGetErrorString(result));
  }
  return MLA_OK;
}
