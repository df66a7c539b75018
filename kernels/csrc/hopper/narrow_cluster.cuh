// Parts of an item that the CTAs of a cluster have computed, in the kernel for few query rows: added up through the
// cluster's shared memory, each CTA a share of the columns. Where several clusters work on an item, their sums go to the
// workspace, and for each share the last to come adds them. Both in an order that depends on their numbers only.
#ifndef MLA_HOPPER_NARROW_CLUSTER_CUH_
#define MLA_HOPPER_NARROW_CLUSTER_CUH_

#include "epilogue.cuh"
#include "narrow_layout.cuh"
#include "narrow_teams.cuh"
#include "schedule.cuh"

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
                                                   int values_slot, int stats_slot, int parts) {
  constexpr int kBatch = 4;  // parts asked for at once
  RowPairSum sum;
#pragma unroll 1
  for (int part = 0; part < parts; part += kBatch) {
    float4 value[kBatch];
    float2 stat[kBatch][2];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int p = min(part + j, parts - 1);
      const float2* from = stats + p * stats_step + (p == 0 ? stats_slot : 0);
      stat[j][0] = __ldcg(from);
      stat[j][1] = __ldcg(from + 8);
      value[j] = __ldcg(values + p * values_step + (p == 0 ? values_slot : 0));
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

// A CTA's share of a cluster's columns, in units of 8 (16 rows x 8 columns: 32 float4 as a warp's accumulators lie). A warp
// takes two units and 4 of the 8 row pairs at a time.
template <typename Operands, int kCtas>
class ClusterMerge {
  using L = NarrowLayout<Operands::kStepBytes, kCtas>;
  using T = typename Operands::T;

 public:
  __device__ __forceinline__ ClusterMerge(const Params& params, const NarrowBarriers<L>& barriers, char* smem, uint32_t base,
                                          const Seat& seat, int thread)
      : params_(params), barriers_(barriers), smem_(smem), base_(base), seat_(seat), thread_(thread) {}

  // All CTAs may send again.
  __device__ __forceinline__ void received() const {
    const int lane = thread_ & 31;
    __syncwarp();
    if (lane < kCtas) mbarrier_arrive_cluster(cluster_address(barriers_.received(), lane));
  }

  // Sends each CTA its columns of this one's part.
  __device__ __forceinline__ void send(const TeamsSum& sum) const {
    const int lane = thread_ & 31;
    const int first = 16 * (thread_ / 32 & 3) + 8 * (thread_ / 128);  // unit
    const int peer = first / L::kUnits, unit = first % L::kUnits;
    const int rank = cluster_rank();
    const uint32_t barrier = cluster_address(barriers_.sent(), peer);
    const uint32_t to = cluster_address(base_ + L::kSentSums + (rank * L::kUnits + unit) * 512 + lane * 16, peer);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float(&v)[4] = sum.value[j];
      store_cluster(to + j * 512, make_float4(v[0], v[1], v[2], v[3]), barrier);
    }
    if (unit == 0 && (lane & 3) == 0) {
      const uint32_t totals = cluster_address(base_ + L::kSentTotals + (rank * L::kRows + lane / 4) * 8, peer);
#pragma unroll
      for (int i = 0; i < 2; ++i) store_cluster(totals + 64 * i, make_float2(sum.maximum[i], sum.total[i]), barrier);
    }
  }

  // Adds up what was sent. `phase`: parity of the number of items before this one.
  __device__ __forceinline__ void add(const Work& work, uint32_t phase) const {
    const int lane = thread_ & 31;
    const RowTable table = row_table<L>(smem_);
    mbarrier_wait_cluster(barriers_.sent(), phase);
    MLA_TRACE_IN(params_, 8);
    if (thread_ == 0) mbarrier_expect(barriers_.sent(), L::kSentBytes);
    RowPairSum sum[kRounds];
    float weight[kCtas][2];
    add_totals(sum[0], weight);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0) sum[round] = sum[0].totals();
      const uint32_t values = base_ + L::kSentSums + local_element(round, lane) * 16;
      float4 value[kCtas];
#pragma unroll
      for (int i = 0; i < kCtas; ++i) value[i] = load_shared4(values + i * L::kUnits * 512);
#pragma unroll
      for (int i = 0; i < kCtas; ++i) sum[round].add(weight[i], value[i]);
    }
    MLA_TRACE_IN(params_, 9);
    if (work.parts == 1) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) store(work, table, round, lane, sum[round]);
    } else if (leave(work, lane, sum)) {
      // From a cluster to the item's next.
      const int values_step = 2 * params_.m_tiles * slot_elements(params_), stats_step = 2 * params_.m_tiles * kCtas * 16;
      const int head = cluster_of(work.head_group);
      const float2* stats = params_.stats + (2 * head * kCtas + int(cluster_rank())) * 16 + row(lane);
#pragma unroll 1
      for (int round = 0; round < kRounds; ++round) {
        const float4* values = params_.partial + 2 * head * slot_elements(params_) + element(round, lane);
        store(work, table, round, lane,
              add_clusters(values, stats, values_step, stats_step, slot_elements(params_), kCtas * 16, work.parts));
      }
    }
    MLA_TRACE_IN(params_, 11);
  }

 private:
  static constexpr int kRounds = L::kUnits / 8;
  static_assert(L::kUnits % 8 == 0, "a warp's columns must all belong to one CTA");

  __device__ __forceinline__ int cluster_of(int group) const { return group * params_.m_tiles + seat_.m_tile; }
  __device__ __forceinline__ int warp() const { return thread_ / 32; }
  __device__ __forceinline__ int row(int lane) const { return 4 * (warp() & 1) + (lane / 4 & 3); }
  // Where the lane's float4 lies among this CTA's columns, and in a part in the workspace.
  __device__ __forceinline__ int local_element(int round, int lane) const {
    return (8 * round + warp() / 2 * 2 + lane / 16) * 32 + row(lane) * 4 + (lane & 3);
  }
  __device__ __forceinline__ int element(int round, int lane) const {
    return int(cluster_rank()) * L::kUnits * 32 + local_element(round, lane);
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
  __device__ __forceinline__ bool leave(const Work& work, int lane, const RowPairSum (&sum)[kRounds]) const {
    const int part = 2 * cluster_of(seat_.group) + (seat_.group == work.head_group);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      params_.partial[part * slot_elements(params_) + element(round, lane)] = sum[round].value;
    }
    if (warp() < 2 && (lane & 19) == 0) {
      float2* stats = params_.stats + (part * kCtas + int(cluster_rank())) * 16 + row(lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) stats[8 * i] = make_float2(sum[0].maximum[i], sum[0].total[i]);
    }
    uint32_t* flag = reinterpret_cast<uint32_t*>(smem_ + L::kSplits);
    named_sync(kBothTeams, 256);
    if (thread_ == 0) {
      uint32_t* arrived = params_.arrived + cluster_of(work.head_group) * kCtas + int(cluster_rank());
      const bool last = add_ordered(arrived) == static_cast<uint32_t>(work.parts - 1);
      if (last) *arrived = 0;  // as the next launch expects it
      *flag = last;
    }
    named_sync(kBothTeams, 256);
    return *flag;
  }

  __device__ __forceinline__ void store(const Work& work, const RowTable& table, int round, int lane,
                                        const RowPairSum& sum) const {
    const int g = row(lane);
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = sum.total[i] == 0.f ? 0.f : Operands::kUnit * __frcp_rn(sum.total[i]);
    const float4 value = make_float4(sum.value.x * inverse[0], sum.value.y * inverse[0], sum.value.z * inverse[1],
                                     sum.value.w * inverse[1]);
    Operands::store_unit(RowPair<T>(params_, table, work.item, g), element(round, lane) / 32, lane, value);
    if (cluster_rank() == 0 && round == 0 && warp() < 2 && (lane & 19) == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) store_lse(params_, table, work.item, g + 8 * i, sum.maximum[i], sum.total[i]);
    }
  }

  const Params& params_;
  const NarrowBarriers<L>& barriers_;
  char* smem_;
  uint32_t base_;
  const Seat& seat_;
  int thread_;
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CLUSTER_CUH_
