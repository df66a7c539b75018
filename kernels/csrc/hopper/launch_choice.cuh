// Which kernel a call's shapes get, and how its work is dealt out: all that the host decides, from numbers measured on an
// H100 (NOTES_hopper.md). Lengths are on the device, so nothing here depends on them.
#ifndef MLA_HOPPER_LAUNCH_CHOICE_CUH_
#define MLA_HOPPER_LAUNCH_CHOICE_CUH_

#include <stdlib.h>

#include <algorithm>

#include "device.h"
#include "mla_decode.h"
#include "narrow.cuh"
#include "narrow_cluster_kernel.cuh"
#include "ring_kernel.cuh"

namespace mla_hopper {

constexpr int kMostCluster = 16;  // CTAs; more than 8 not everywhere

inline int ceil_div(int64_t value, int divisor) { return static_cast<int>((value + divisor - 1) / divisor); }

// A number that was measured (NOTES_hopper.md); a build with MLA_HOPPER_TUNING takes it from the environment.
inline int tuned(const char* variable, int value) {
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
inline RowTiles row_tiles(const mla_decode_params& p, int ctas) {
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

struct Variant {
  void (*function)(const Params, const CUtensorMap, const CUtensorMap);
  int threads, shared_bytes;
  int copied_tokens;  // of one bulk tensor copy from a 16-bit cache
  int cluster = 1;    // CTAs
};

template <typename T, typename L>
Variant ring() {
  return {mla_decode_ring_kernel<T, L>, L::kThreads, L::kBytes, kTileTokens};
}

template <typename Operands, int kCtas>
Variant narrow_cluster() {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  return {mla_decode_narrow_cluster_kernel<Operands, kCtas>, L::kThreads, L::kBytes, Operands::kStepTokens, kCtas};
}

template <typename Operands>
Variant narrow(int cluster) {
  using L = typename Operands::L;
  switch (cluster) {
    case 2: return narrow_cluster<Operands, 2>();
    case 4: return narrow_cluster<Operands, 4>();
    case 8: return narrow_cluster<Operands, 8>();
    case 16: return narrow_cluster<Operands, 16>();
    default: return {mla_decode_narrow_kernel<Operands>, L::kThreads, L::kBytes, Operands::kStepTokens};
  }
}

inline Variant choose(int32_t q_dtype, bool fp8, bool few_rows, int cluster) {
  if (fp8) return few_rows ? narrow<NarrowFp8>(cluster) : ring<__nv_bfloat16, RingFp8Layout>();
  if (q_dtype == MLA_DTYPE_BFLOAT16) {
    return few_rows ? narrow<Narrow16bit<__nv_bfloat16>>(cluster) : ring<__nv_bfloat16, RingLayout>();
  }
  return few_rows ? narrow<Narrow16bit<__half>>(cluster) : ring<__half, RingLayout>();
}

// Lets a kernel have the shared memory and the clusters that it is launched with.
inline cudaError_t allow(const Variant& variant) {
  const void* function = reinterpret_cast<const void*>(variant.function);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes);
  if (error == cudaSuccess && variant.cluster > 8) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

// The configuration of a launch; `attribute` must live as long. CTAs outside of clusters wait for each other.
inline cudaLaunchConfig_t launch_config(const Variant& variant, dim3 grid, cudaLaunchAttribute& attribute) {
  attribute = {};
  if (variant.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = variant.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(variant.threads);
  config.dynamicSmemBytes = variant.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// CTAs that share an item's tiles and merge through each other's shared memory: clusters of `size`, `each` of them for 16
// query rows of an item. With a size of 1 there are none.
struct Clusters {
  int size, each;
};

// How many such clusters fit on the device at once: fewer than multiprocessors would make, whose groups have different
// sizes.
template <int kCtas>
int count_clusters() {
  const Variant variant = narrow_cluster<Narrow16bit<__half>, kCtas>();
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(variant, dim3(kCtas), attribute);
  int count = 0;
  if (allow(variant) != cudaSuccess || cudaOccupancyMaxActiveClusters(&count, variant.function, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// The same, asked once for each device.
inline int clusters_at_once(const Device& device, int size) {
  static int known[kDevices][kMostCluster + 1];  // 1 more than the number, 0: not asked yet
  if (device.index >= kDevices) return 0;
  int& count = known[device.index][size];
  if (count == 0) {
    switch (size) {
      case 2: count = count_clusters<2>(); break;
      case 4: count = count_clusters<4>(); break;
      case 8: count = count_clusters<8>(); break;
      default: count = count_clusters<16>();
    }
    ++count;
  }
  return count - 1;
}

// The most tiles of a CTA in a cluster, of which an item's rows have `each`. Half of the multiprocessors keep up with memory
// where a tile is read once; where several CTAs read it, or have to unpack it, fewer tiles or more CTAs are needed. The limit
// bounds as well what a batch of different lengths can lose, as nobody helps with the longest.
inline int most_cluster_tiles(const mla_decode_params& p, const RowTiles& tiles, int size, int each, int ctas) {
  const bool fp8 = p.kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  if (tiles.count == 1) return tuned("MLA_HOPPER_CLUSTER_MOST", fp8 ? 8 : 16);
  const bool busy = tiles.count == 2 ? size == 8 : 4 * size * p.batch * tiles.count >= 3 * ctas;
  return tuned("MLA_HOPPER_CLUSTER_MOST", each > 1 ? 5 : (busy ? 8 : 4));
}

// The largest clusters of which each item's rows get one, or several of 8. They merge sooner than CTAs that meet in the
// workspace, but leave multiprocessors idle, so that they pay (NOTES_hopper.md) while no CTA has many tiles.
inline Clusters choose_clusters(const mla_decode_params& p, const RowTiles& tiles, const Device& device) {
  const Clusters none = {1, 0};
  if (tiles.rows != kNarrowRows) return none;
  const int most = std::max(1, p.max_blocks_per_seq - 1);  // pages of an item: callers' tables have a column to spare
  for (int size = tuned("MLA_HOPPER_CLUSTER", kMostCluster); size > 1; size /= 2) {
    int each = clusters_at_once(device, size) / tiles.count / p.batch;
    if (each == 0) continue;
    // Those of 16 where each CTA then has one tile instead of two. Beside another, a cluster should have two for each.
    if (size == 16 && (most <= 8 || most > 16 * each)) continue;
    each = size < 8 ? 1 : std::min({each, kMostClusters, ceil_div(most, tuned("MLA_HOPPER_CLUSTER_TILES", 16))});
    return most <= most_cluster_tiles(p, tiles, size, each, device.ctas) * size * each ? Clusters{size, each} : none;
  }
  return none;
}

// How the schedule (schedule.cuh) cuts the line of tiles into pieces.
inline void choose_pieces(Params& k, const mla_decode_params& p, const RowTiles& tiles) {
  k.most_parts = tuned("MLA_HOPPER_MOST_PARTS", k.row_groups == 1 ? 96 : (k.row_groups == 2 ? 48 : 24));
  k.min_tiles = tuned("MLA_HOPPER_MIN_TILES", 1);
  k.split_cost = tuned("MLA_HOPPER_SPLIT_COST", 8);
  const bool alone = k.m_tiles == 1;
  // Half of the multiprocessors keep up with memory where a tile is read once, if it need not be unpacked.
  const bool unpacks = p.kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  const bool ring = tiles.rows == kTileRows;
  k.whole_below = tuned("MLA_HOPPER_WHOLE_BELOW", unpacks ? 0 : ring ? (alone ? 32 : 8) : (alone ? 16 : 0));
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_LAUNCH_CHOICE_CUH_
