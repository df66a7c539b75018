// Parts of an item that the CTAs of a cluster have computed, in the kernel for few query rows: added up through the
// cluster's shared memory, each CTA a share of the columns. Where several clusters work on an item, their sums go to the
// workspace, and for each share the last to come adds them. Both in an order that depends on their numbers only.
// The factors of what is added are made by one thread for all, while the sums travel.
#ifndef MLA_HOPPER_NARROW_CLUSTER_CUH_
#define MLA_HOPPER_NARROW_CLUSTER_CUH_

#include "epilogue.cuh"
#include "narrow_layout.cuh"
#include "narrow_teams.cuh"
#include "part_pack.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// What kCount neighbouring lanes have of a row, a part each: maximum of the scores in log2 units and sum of the weights
// relative to it. Returns the factor of the lane's part; `stat` becomes that of all parts.
template <int kCount>
__device__ __forceinline__ float weigh_neighbours(float2& stat) {
  const float own = stat.x;
#pragma unroll
  for (int offset = kCount / 2; offset > 0; offset /= 2) {
    stat.x = fmaxf(stat.x, __shfl_xor_sync(0xFFFFFFFFu, stat.x, offset));
  }
  const float weight = exp2_approximate(own - (stat.x == -INFINITY ? 0.f : stat.x));
  stat.y *= weight;
#pragma unroll
  for (int offset = kCount / 2; offset > 0; offset /= 2) stat.y += __shfl_xor_sync(0xFFFFFFFFu, stat.y, offset);
  return weight;
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
    parts_ = max(1, min(params.shares, tile_count(length) + kCtas - 1) / kCtas);
  }

  // Whether this cluster has any of the item's tiles, or stores the result of an item without tokens.
  __device__ __forceinline__ bool has_part() const { return part() < parts_; }

  // Sends each CTA its columns of this one's sums; first what the sums are weighted by.
  __device__ __forceinline__ void send(const TeamsSum& sum) const {
    const int lane = thread_ & 31;
    const int first = 16 * (thread_ / 32 & 3) + 8 * (thread_ / 128);  // unit
    const int rank = cluster_rank();
    uint4 packed[4];
    const auto& values = *reinterpret_cast<const float(*)[32]>(sum.value[0]);
    const float2 factors = pack_rows<8>(values, [&](int i, const uint4& both) { packed[i] = both; });
    // A lane of each quad for each CTA that gets columns of this warp.
    if ((lane & 3) < kPeers) {
      const int peer = first / L::kUnits + (lane & 3);
      const uint32_t barrier = cluster_address(barriers_.totals_sent(), peer);
      if (first % L::kUnits == 0 || kPeers > 1) {
        const uint32_t totals = cluster_address(base_ + L::kSentTotals + (rank * L::kRows + lane / 4) * 8, peer);
#pragma unroll
        for (int i = 0; i < 2; ++i) store_cluster(totals + 64 * i, make_float2(sum.maximum[i], sum.total[i]), barrier);
      }
      const uint32_t to = base_ + L::kSentFactors + ((first % L::kUnits / 8 * kCtas + rank) * 8 + lane / 4) * 8;
      store_cluster(cluster_address(to, peer), factors, barrier);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int unit = first + 2 * i;
      const int peer = unit / L::kUnits;
      const uint32_t to = base_ + L::kSentSums + (rank * L::kUnits + unit % L::kUnits) * 256 + lane * 16;
      store_cluster(cluster_address(to, peer), packed[i], cluster_address(barriers_.sums_sent(), peer));
    }
  }

  // Adds up what was sent.
  __device__ __forceinline__ void add() const {
    const int lane = thread_ & 31;
    const RowTable table = row_table<L>(smem_);
    const RowPair<T> rows(params_, table, seat_.item, row(lane));
    mbarrier_wait_cluster(barriers_.totals_sent(), 0);
    float2 stat;  // of all CTAs, for the rows of the threads that weigh them
    if (thread_ < kCtas * L::kRows) stat = weigh_ctas(table);
    named_sync(kBothTeams, 256);
    MLA_TRACE_IN(params_, 10);
    mbarrier_wait_cluster(barriers_.sums_sent(), 0);
    MLA_TRACE_IN(params_, 8);
    float4 sum[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      sum[round] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (!adds()) break;
      const uint32_t values =
          base_ + L::kSentSums + (4 * round + warp() / 2) * 512 + row(lane) * 64 + (lane & 3) * 16 + lane / 16 * 8;
#pragma unroll
      for (int i = 0; i < kCtas; ++i) {
        uint32_t packed[2];
        load_shared(packed, values + i * L::kUnits * 256);
        const float2 low = __half22float2(unpacked(packed[0])), high = __half22float2(unpacked(packed[1]));
        add_weighted(sum[round], load_shared2(weights(round * kCtas + i, row(lane))), make_float4(low.x, low.y, high.x, high.y));
      }
    }
    MLA_TRACE_IN(params_, 9);
    if (parts_ > 1) {
      if (!leave(lane, sum, stat)) return;
      add_clusters(table, lane, sum);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (adds()) Operands::store_unit(rows, element(round, lane) / 32, lane, sum[round]);
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

  // Where the factors of part `part` for rows `row` and `row` + 8 are, float2; or that of one row, float.
  __device__ __forceinline__ uint32_t weights(int part, int row) const {
    return base_ + L::kWeights + (part * 8 + (row & 7)) * 8 + row / 8 * 4;
  }

  // One thread for each row and CTA: the factor of what it sent, which includes the quotient by the row's total if that is
  // known now.
  __device__ __forceinline__ float2 weigh_ctas(const RowTable& table) const {
    const int row = thread_ / kCtas, from = thread_ % kCtas;
    float2 stat = load_shared2(base_ + L::kSentTotals + (from * L::kRows + row) * 8);
    float weight = weigh_neighbours<kCtas>(stat);
    if (parts_ == 1) {
      weight *= inverse_of(stat.y);
      if (from == 0 && cluster_rank() == 0) store_lse(params_, table, seat_.item, row, stat.x, stat.y);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const uint32_t factors = base_ + L::kSentFactors + ((round * kCtas + from) * 8 + (row & 7)) * 8;
      const float factor = load_shared<float>(factors + row / 8 * 4);
      store_shared(weights(round * kCtas + from, row), __float_as_uint(weight * factor));
    }
    return stat;
  }

  // The sums of all clusters that have left theirs.
  __device__ __forceinline__ void add_clusters(const RowTable& table, int lane, float4 (&sum)[kRounds]) const {
    constexpr int kBatch = 8;  // parts asked for at once
    const int stride = slot_elements(params_);
    const float4* first = params_.partial + first_cluster() * stride;
    {
      const int row = thread_ / kMostClusters, part = thread_ % kMostClusters;
      float2 stat = make_float2(-INFINITY, 0.f);
      if (part < parts_) {
        stat = __ldcg(params_.stats + ((first_cluster() + part) * kCtas + int(cluster_rank())) * L::kRows + row);
      }
      float weight = weigh_neighbours<kMostClusters>(stat);
      store_shared(weights(part, row), __float_as_uint(weight * inverse_of(stat.y)));
      if (part == 0 && cluster_rank() == 0) store_lse(params_, table, seat_.item, row, stat.x, stat.y);
    }
    named_sync(kBothTeams, 256);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      sum[round] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (!adds()) break;
#pragma unroll 1
      for (int part = 0; part < parts_; part += kBatch) {
        float4 value[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (part + j < parts_) value[j] = __ldcg(first + (part + j) * stride + element(round, lane));
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (part + j < parts_) add_weighted(sum[round], load_shared2(weights(part + j, row(lane))), value[j]);
        }
      }
    }
  }

  // Leaves the cluster's sums in the workspace; whether all others have done so.
  __device__ __forceinline__ bool leave(int lane, const float4 (&sum)[kRounds], const float2& stat) const {
    const int cluster = first_cluster() + part();
#pragma unroll
    for (int round = 0; round < kRounds && adds(); ++round) {
      params_.partial[cluster * slot_elements(params_) + element(round, lane)] = sum[round];
    }
    if (thread_ < kCtas * L::kRows && thread_ % kCtas == 0) {
      params_.stats[(cluster * kCtas + int(cluster_rank())) * L::kRows + thread_ / kCtas] = stat;
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
