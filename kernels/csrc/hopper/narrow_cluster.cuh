// Parts of an item that the CTAs of a cluster have computed, in the kernel for few query rows: added up through the
// cluster's shared memory, each CTA a share of the columns. Where several clusters work on an item, their sums go to the
// workspace, and for each share the last to come adds them. Both in an order that depends on their numbers only.
#ifndef MLA_HOPPER_NARROW_CLUSTER_CUH_
#define MLA_HOPPER_NARROW_CLUSTER_CUH_

#include "epilogue.cuh"
#include "narrow_layout.cuh"
#include "narrow_teams.cuh"
#include "narrow_pack.cuh"

namespace mla_hopper {

// Rows g and g + 8 of a part, or of several: maximum of the scores in log2 units, sum of the weights relative to it, and of
// weights times values; x, y of the first row, z, w of the other.
struct RowPairSum {
  float maximum[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.f, 0.f};
  float4 value = {0.f, 0.f, 0.f, 0.f};

  // The statistics alone.
  __device__ __forceinline__ RowPairSum totals() const {
    RowPairSum same;
#pragma unroll
    for (int i = 0; i < 2; ++i) same.maximum[i] = maximum[i], same.total[i] = total[i];
    return same;
  }

  __device__ __forceinline__ void add(const float (&weight)[2], const float4& other) {
    value.x += weight[0] * other.x;
    value.y += weight[0] * other.y;
    value.z += weight[1] * other.z;
    value.w += weight[1] * other.w;
  }
};

// The sum over the clusters that work on an item, once each has left its own in the workspace.
__device__ __forceinline__ RowPairSum add_clusters(const float4* values, const float2* stats, int values_step, int stats_step,
                                                   int parts) {
  constexpr int kBatch = 8;  // parts asked for at once
  RowPairSum sum;
#pragma unroll 1
  for (int part = 0; part < parts; part += kBatch) {
    float4 value[kBatch];
    float2 stat[kBatch][2];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int p = min(part + j, parts - 1);
      stat[j][0] = __ldcg(stats + p * stats_step);
      stat[j][1] = __ldcg(stats + p * stats_step + 8);
      value[j] = __ldcg(values + p * values_step);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (part + j >= parts) break;
      float weight[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float largest = fmaxf(sum.maximum[i], stat[j][i].x);
        const float reference = largest == -INFINITY ? 0.f : largest;
        const float alpha = exp2_approximate(sum.maximum[i] - reference);
        weight[i] = exp2_approximate(stat[j][i].x - reference);
        sum.maximum[i] = largest;
        sum.total[i] = sum.total[i] * alpha + stat[j][i].y * weight[i];
        (i ? sum.value.z : sum.value.x) *= alpha;
        (i ? sum.value.w : sum.value.y) *= alpha;
      }
      sum.add(weight, value[j]);
    }
  }
  return sum;
}

// Where a CTA stands: which of the item's tiles are its own (`share` and every `shares`-th after it), which query rows.
struct ClusterSeat {
  int share, m_tile, item;
};

// A CTA's share of a cluster's columns, in units of 8 (16 rows x 8 columns: 32 float4 as a warp's accumulators lie). A warp
// takes two units and 4 of the 8 row pairs at a time.
template <typename Operands, int kCtas>
class ClusterMerge {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  using T = typename Operands::T;

 public:
  __device__ __forceinline__ ClusterMerge(const Params& params, const NarrowBarriers<L>& barriers, char* smem, uint32_t base,
                                          const ClusterSeat& seat, int length, int thread)
      : params_(params), barriers_(barriers), smem_(smem), base_(base), seat_(seat), thread_(thread) {
    const int tiles = (length + kTileTokens - 1) / kTileTokens;
    parts_ = max(1, min(params.shares, tiles + kCtas - 1) / kCtas);
  }

  // Whether this cluster has any of the item's tiles, or stores the result of an item without tokens.
  __device__ __forceinline__ bool has_part() const { return part() < parts_; }

  // Sends each CTA its columns of this one's sums; first what the sums are weighted by.
  __device__ __forceinline__ void send(const TeamsSum& sum) const {
    const int lane = thread_ & 31;
    const int first = 16 * (thread_ / 32 & 3) + 8 * (thread_ / 128);  // unit
    const int rank = cluster_rank();
    // A lane of each quad for each CTA that gets columns of this warp: of all warps with such columns, the first.
    if ((lane & 3) < kPeers && (kPeers > 1 || first % L::kUnits == 0)) {
      const int peer = first / L::kUnits + (lane & 3);
      const uint32_t barrier = cluster_address(barriers_.totals_sent(), peer);
      const uint32_t totals = cluster_address(base_ + L::kSentTotals + (rank * L::kRows + lane / 4) * 8, peer);
#pragma unroll
      for (int i = 0; i < 2; ++i) store_cluster(totals + 64 * i, make_float2(sum.maximum[i], sum.total[i]), barrier);
    }
    const PackScale scale = PackScale::of(sum.value);
    if (lane < kPeers) {
      const int peer = first / L::kUnits + lane;
      const uint32_t factor = base_ + L::kSentFactors + (first % L::kUnits / 8 * kCtas + rank) * 4;
      store_cluster(cluster_address(factor, peer), scale.from, cluster_address(barriers_.sums_sent(), peer));
    }
#pragma unroll
    for (int part = 0; part < kPeers; ++part) {
      constexpr int kChunks = 8 / kPeers;
      const int peer = first / L::kUnits + part, unit = first % L::kUnits;
      const uint32_t barrier = cluster_address(barriers_.sums_sent(), peer);
      const uint32_t to = cluster_address(base_ + L::kSentSums + (rank * L::kUnits + unit) * 256 + lane * 16, peer);
#pragma unroll
      for (int j = 0; j < kChunks; j += 2) {
        store_cluster(to + j * 256, pack_chunks(sum.value[kChunks * part + j], scale.to, scale.to), barrier);
      }
    }
  }

  // Adds up what was sent.
  __device__ __forceinline__ void add() const {
    const int lane = thread_ & 31;
    const RowTable table = row_table<L>(smem_);
    const RowPair<T> rows(params_, table, seat_.item, row(lane));
    if (parts_ == 1 && !adds()) return;
    mbarrier_wait_cluster(barriers_.totals_sent(), 0);
    RowPairSum sum[kRounds];
    float weight[kCtas][2];
    add_totals(sum[0], weight);
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = inverse_of(sum[0].total[i]);
    if (parts_ == 1) store_statistics(table, lane, sum[0]);
    MLA_TRACE_IN(params_, 10);
    mbarrier_wait_cluster(barriers_.sums_sent(), 0);
    MLA_TRACE_IN(params_, 8);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (!adds()) break;
      if (round > 0) sum[round] = sum[0].totals();
      const uint32_t values =
          base_ + L::kSentSums + (4 * round + warp() / 2) * 512 + row(lane) * 64 + (lane & 3) * 16 + lane / 16 * 8;
      const uint32_t factors = base_ + L::kSentFactors + round * kCtas * 4;
      uint32_t packed[kCtas][2];
      float factor[kCtas];
#pragma unroll
      for (int i = 0; i < kCtas; ++i) {
        load_shared(packed[i], values + i * L::kUnits * 256);
        factor[i] = load_shared<float>(factors + i * 4);
      }
#pragma unroll
      for (int i = 0; i < kCtas; ++i) {
        const float scaled[2] = {weight[i][0] * factor[i], weight[i][1] * factor[i]};
        const float2 low = __half22float2(unpacked(packed[i][0])), high = __half22float2(unpacked(packed[i][1]));
        sum[round].add(scaled, make_float4(low.x, low.y, high.x, high.y));
      }
    }
    MLA_TRACE_IN(params_, 9);
    if (parts_ == 1) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) store(rows, round, lane, sum[round].value, inverse);
    } else if (leave(lane, sum)) {
      const float2* stats = params_.stats + (first_cluster() * kCtas + int(cluster_rank())) * kNarrowRows + row(lane);
#pragma unroll 1
      for (int round = 0; round < kRounds && adds(); ++round) {
        const float4* values = params_.partial + first_cluster() * slot_elements(params_) + element(round, lane);
        const RowPairSum all = add_clusters(values, stats, slot_elements(params_), kCtas * kNarrowRows, parts_);
#pragma unroll
        for (int i = 0; i < 2; ++i) inverse[i] = inverse_of(all.total[i]);
        store(rows, round, lane, all.value, inverse);
        if (round == 0) store_statistics(table, lane, all);
      }
    }
    MLA_TRACE_IN(params_, 11);
  }

 private:
  static constexpr int kRounds = L::kSenders;
  static constexpr int kPeers = L::kUnits < 8 ? 8 / L::kUnits : 1;  // that a warp has columns of

  __device__ __forceinline__ int part() const { return seat_.share / kCtas; }
  // Of the clusters that share the item's tiles for the same rows.
  __device__ __forceinline__ int first_cluster() const {
    return (seat_.item * params_.m_tiles + seat_.m_tile) * (params_.shares / kCtas);
  }
  __device__ __forceinline__ int warp() const { return thread_ / 32; }
  // Whether there are columns for the warp to add up.
  __device__ __forceinline__ bool adds() const { return kPeers == 1 || warp() < L::kUnits; }
  __device__ __forceinline__ int row(int lane) const { return 4 * (warp() & 1) + (lane / 4 & 3); }
  // Which float4 of the cluster's sums is the lane's.
  __device__ __forceinline__ int element(int round, int lane) const {
    const int unit = int(cluster_rank()) * L::kUnits + 8 * round + warp() / 2 * 2 + lane / 16;
    return unit * 32 + row(lane) * 4 + (lane & 3);
  }

  // The rows' statistics over the cluster, and the factors of its CTAs' sums.
  __device__ __forceinline__ void add_totals(RowPairSum& sum, float (&weight)[kCtas][2]) const {
    const uint32_t totals = base_ + L::kSentTotals + row(thread_ & 31) * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 total[kCtas];
#pragma unroll
      for (int j = 0; j < kCtas; ++j) {
        total[j] = load_shared2(totals + j * 128 + i * 64);
        sum.maximum[i] = fmaxf(sum.maximum[i], total[j].x);
      }
      const float reference = sum.maximum[i] == -INFINITY ? 0.f : sum.maximum[i];
#pragma unroll
      for (int j = 0; j < kCtas; ++j) {
        weight[j][i] = exp2_approximate(total[j].x - reference);
        sum.total[i] += total[j].y * weight[j][i];
      }
    }
  }

  // Leaves the cluster's sums in the workspace; whether all others have done so.
  __device__ __forceinline__ bool leave(int lane, const RowPairSum (&sum)[kRounds]) const {
    const int cluster = first_cluster() + part();
#pragma unroll
    for (int round = 0; round < kRounds && adds(); ++round) {
      params_.partial[cluster * slot_elements(params_) + element(round, lane)] = sum[round].value;
    }
    if (warp() < 2 && (lane & 19) == 0) {
      float2* stats = params_.stats + (cluster * kCtas + int(cluster_rank())) * kNarrowRows + row(lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) stats[8 * i] = make_float2(sum[0].maximum[i], sum[0].total[i]);
    }
    uint32_t* flag = reinterpret_cast<uint32_t*>(smem_ + L::kSplits);
    named_sync(kBothTeams, 256);
    if (thread_ == 0) {
      uint32_t* arrived = params_.arrived + first_cluster() * kCtas + int(cluster_rank());
      const bool last = add_ordered(arrived) == static_cast<uint32_t>(parts_ - 1);
      if (last) *arrived = 0;  // as the next launch expects it
      *flag = last;
    }
    named_sync(kBothTeams, 256);
    return *flag;
  }

  // What the sums of weights times values are multiplied with.
  static __device__ __forceinline__ float inverse_of(float total) { return total == 0.f ? 0.f : Operands::kUnit * __frcp_rn(total); }

  __device__ __forceinline__ void store(const RowPair<T>& rows, int round, int lane, const float4& value,
                                        const float (&inverse)[2]) const {
    Operands::store_unit(rows, element(round, lane) / 32, lane,
                         make_float4(value.x * inverse[0], value.y * inverse[0], value.z * inverse[1], value.w * inverse[1]));
  }

  // One lane of the cluster for each row pair.
  __device__ __forceinline__ void store_statistics(const RowTable& table, int lane, const RowPairSum& sum) const {
    if (cluster_rank() != 0 || warp() >= 2 || (lane & 19) != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) store_lse(params_, table, seat_.item, row(lane) + 8 * i, sum.maximum[i], sum.total[i]);
  }

  const Params& params_;
  const NarrowBarriers<L>& barriers_;
  char* smem_;
  uint32_t base_;
  const ClusterSeat& seat_;
  int thread_;
  int parts_;  // clusters that have tiles of the item
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CLUSTER_CUH_
