// Parts of an item that CTAs without a cluster have computed, in the kernel for few query rows: each CTA leaves its part in
// the workspace, copies its share of the columns of every part as that comes (all CTAs of the launch are resident, the
// launch is cooperative), and adds them up in an order that depends on the parts' number only.
#ifndef MLA_HOPPER_NARROW_MERGE_CUH_
#define MLA_HOPPER_NARROW_MERGE_CUH_

#include "epilogue.cuh"
#include "merge.cuh"
#include "narrow_layout.cuh"
#include "narrow_steps.cuh"
#include "schedule.cuh"

namespace mla_hopper {

constexpr int kAddBarrier = 8;  // and 9 to 11: the warps that share a piece

// A piece of one part or of several, 16 columns: of rows g and g + 8 the maximum of the scores in log2 units, the sum of the
// weights relative to it, and the sums of weights times values, two chunks.
struct PieceSum {
  float maximum[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.f, 0.f};
  float4 value[2] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};

  // Maximum and total of the first row, then of the other. Those of nothing are (-inf, 0).
  static __device__ __forceinline__ float4 nothing() { return make_float4(-INFINITY, 0.f, -INFINITY, 0.f); }
  __device__ __forceinline__ float4 statistics() const { return make_float4(maximum[0], total[0], maximum[1], total[1]); }

  __device__ __forceinline__ float2 inverse() const {
    return make_float2(inverse_of(total[0]), inverse_of(total[1]));
  }

  // Takes others' statistics in; their weights from then on.
  template <int kOthers>
  __device__ __forceinline__ void add_statistics(const float4 (&others)[kOthers], float2 (&weight)[kOthers]) {
    float alpha[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = maximum[i];
#pragma unroll
      for (int j = 0; j < kOthers; ++j) largest = fmaxf(largest, i ? others[j].z : others[j].x);
      const float reference = largest == -INFINITY ? 0.f : largest;
      alpha[i] = exp2_approximate(maximum[i] - reference);
      maximum[i] = largest;
      total[i] *= alpha[i];
#pragma unroll
      for (int j = 0; j < kOthers; ++j) {
        const float factor = exp2_approximate((i ? others[j].z : others[j].x) - reference);
        total[i] += factor * (i ? others[j].w : others[j].y);
        (i ? weight[j].y : weight[j].x) = factor;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      value[i] = make_float4(value[i].x * alpha[0], value[i].y * alpha[0], value[i].z * alpha[1], value[i].w * alpha[1]);
    }
  }
};

// A part lies in the workspace as store_partial() leaves it, its statistics as float4 [8 row pairs]. A CTA's share of the
// columns is counted in pieces of 16, uint4 [32 lanes]: what a warp takes.
template <typename Operands>
class NarrowMerge {
  using T = typename Operands::T;
  using L = typename Operands::L;
  static constexpr int kPieces = kLatent / 16;
  static constexpr int kSetPieces = 4;  // with the same packing factors: a warp's
  static constexpr int kPieceBytes = 32 * 16, kFactorBytes = 8 * 8, kStatisticsBytes = 8 * 16;
  static constexpr int kWarps = kMergeThreads / 32;
  static constexpr int kFewParts = 7;  // a share of each is more than 4 pieces: something to do for most warps
  static_assert(kMostParts < kMergeThreads, "a thread waits for each part");
  static_assert((kPieces + kMostParts) * kPieceBytes + (kMostParts + 1) * (8 * kFactorBytes + kStatisticsBytes) <=
                    L::kRawSlots * L::kStepBytes,
                "the ring must hold a share of all parts");

 public:
  // `barrier`: an mbarrier that one thread arrives at.
  __device__ __forceinline__ NarrowMerge(const Params& params, char* smem, uint32_t barrier, int thread)
      : params_(params), smem_(smem), barrier_(barrier), thread_(thread) {}

  // This CTA's part to the workspace. `slot` as in Split.
  __device__ __forceinline__ void leave(int slot, const TeamsSum& sum) const {
    const int lane = thread_ & 31, warp = thread_ / 32;
    const int index = 2 * blockIdx.x + slot;
    if (warp == 0 && (lane & 3) == 0) {
      statistics(index)[lane / 4] = make_float4(sum.maximum[0], sum.total[0], sum.maximum[1], sum.total[1]);
    }
    float value[32];
#pragma unroll
    for (int e = 0; e < 32; ++e) value[e] = sum.value[e / 4][e % 4] * Operands::kUnit;
    store_partial<8>(params_, index, 2 * (warp & 3) + warp / 4, lane, value);
    named_sync(kMergeBarrier, kMergeThreads);  // all have stored
    if (thread_ == 0) add_release(params_.arrived + index, 1);
    MLA_TRACE_IN(params_, 10);
  }

  // Adds up this CTA's share of an item, copied into the ring's room, and returns 1; 0 if it has none, as there are more
  // parts than pieces. `phase`: how often there was one before.
  __device__ __forceinline__ uint32_t add(const Split& split, uint32_t phase) const {
    const int share = (kPieces + split.parts - 1) / split.parts;
    const int begin = split.mine * share;
    if (begin >= kPieces) return 0;
    const Copies copies(split.parts, begin, min(share, kPieces - begin));
    if (thread_ == 0) mbarrier_expect(barrier_, copies.bytes());
    named_sync(kMergeBarrier, kMergeThreads);  // before any copy, and all are done with the ring
    copy_parts(split, copies, (kPieces + share - 1) / share);
    MLA_TRACE_IN(params_, 11);
    const RowPair<T> rows(params_, row_table<L>(smem_), split.item, thread_ / 4 & 7);
    mbarrier_wait(barrier_, phase);
    MLA_TRACE_IN(params_, 12);
    if (split.parts <= kFewParts) {
      add_pieces(split, copies, rows);
    } else {
      add_piece(split, copies, rows, share > 2 ? 2 : (share > 1 ? 4 : 8));
    }
    MLA_TRACE_IN(params_, 14);
    return 1;
  }

 private:
  // What a CTA copies of an item's parts, one part after the other, by byte in shared memory: `count` pieces from `begin` on,
  // the factors of the sets that these belong to, the statistics.
  struct Copies {
    int parts, begin, count;
    __device__ __forceinline__ Copies(int parts, int begin, int count) : parts(parts), begin(begin), count(count) {}
    __device__ __forceinline__ int set() const { return begin / kSetPieces; }
    __device__ __forceinline__ int sets() const { return (begin + count - 1) / kSetPieces - set() + 1; }
    __device__ __forceinline__ int bytes() const {
      return parts * (count * kPieceBytes + sets() * kFactorBytes + kStatisticsBytes);
    }
    __device__ __forceinline__ int statistics(int part) const { return L::kRing + part * kStatisticsBytes; }
    __device__ __forceinline__ int values(int part) const { return statistics(parts) + part * count * kPieceBytes; }
    __device__ __forceinline__ int factors(int part) const { return values(parts) + part * sets() * kFactorBytes; }
  };

  __device__ __forceinline__ float4* statistics(int index) const { return reinterpret_cast<float4*>(params_.stats + index * 64); }

  // A thread waits for each part and asks for it: every eighth of one warp. A part's counter is 1 when it is there, counts
  // the CTAs that have seen it, and is back at 0 with the last of these `readers`.
  __device__ __forceinline__ void copy_parts(const Split& split, const Copies& copies, int readers) const {
    const int part = (thread_ & 31) * kWarps + thread_ / 32;
    const int index = part_index(params_, split, part);
    const uint32_t base = shared_address(smem_);
    bool waiting = part < split.parts;
    while (waiting) {
      if (load_acquire(params_.arrived + index) != 0) {
        fence_async_proxy_global();  // it had been written by ordinary stores
        const uint4* from = part_at(params_, index);
        bulk_copy(base + copies.statistics(part), statistics(index), kStatisticsBytes, barrier_, kNormal);
        bulk_copy(base + copies.values(part), from + kFactorElements + copies.begin * 32, copies.count * kPieceBytes, barrier_,
                  kNormal);
        bulk_copy(base + copies.factors(part), from + copies.set() * (kFactorBytes / 16), copies.sets() * kFactorBytes, barrier_,
                  kNormal);
        add_cyclic(params_.arrived + index, readers);
        waiting = false;
      }
    }
  }

  // Of the lane's rows and columns, in shared memory; those of the next part.
  __device__ __forceinline__ const float4* statistics(const Copies& copies) const {
    return reinterpret_cast<const float4*>(smem_ + copies.statistics(0)) + (thread_ / 4 & 7);
  }
  __device__ __forceinline__ const uint4* values(const Copies& copies, int piece) const {
    return reinterpret_cast<const uint4*>(smem_ + copies.values(0)) + piece * 32 + (thread_ & 31);
  }
  __device__ __forceinline__ const float2* factors(const Copies& copies, int piece) const {
    const int set = (copies.begin + piece) / kSetPieces - copies.set();
    return reinterpret_cast<const float2*>(smem_ + copies.factors(0)) + set * 8 + (thread_ / 4 & 7);
  }

  // Few parts, whose weights a warp keeps for all of its pieces.
  __device__ __forceinline__ void add_pieces(const Split& split, const Copies& copies, const RowPair<T>& rows) const {
    float4 statistic[kFewParts];
    float2 weight[kFewParts];
#pragma unroll
    for (int j = 0; j < kFewParts; ++j) statistic[j] = j < split.parts ? statistics(copies)[j * 8] : PieceSum::nothing();
    PieceSum sum;
    sum.add_statistics(statistic, weight);
    if (split.mine == 0 && thread_ < 32) store_lse(split.item, sum);
    const float2 inverse = sum.inverse();
    const int values_step = copies.count * 32, factors_step = copies.sets() * 8;
#pragma unroll 1
    for (int piece = thread_ / 32; piece < copies.count; piece += kWarps) {
      uint4 packed[kFewParts];
      float2 factor[kFewParts];
#pragma unroll
      for (int j = 0; j < kFewParts; ++j) {
        if (j < split.parts) {
          packed[j] = values(copies, piece)[j * values_step];
          factor[j] = factors(copies, piece)[j * factors_step];
        }
      }
      float4 value[2] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
      for (int j = 0; j < kFewParts; ++j) {
        if (j >= split.parts) break;
        add_packed(value[0], value[1], packed[j], weight[j].x * factor[j].x, weight[j].y * factor[j].y);
      }
      store(rows, copies.begin + piece, value, inverse);
    }
  }

  // Many parts: a team of `members` warps takes a piece, each warp every `members`-th part. A team has a piece at most.
  __device__ __forceinline__ void add_piece(const Split& split, const Copies& copies, const RowPair<T>& rows,
                                            int members) const {
    constexpr int kBatch = 5;
    const int warp = thread_ / 32, lane = thread_ & 31;
    const int piece = warp / members, member = warp & (members - 1);
    if (piece >= copies.count) return;
    PieceSum sum;
#pragma unroll 1
    for (int first = member; first < split.parts; first += kBatch * members) {
      float4 statistic[kBatch];
      float2 weight[kBatch], factor[kBatch];
      uint4 packed[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int part = first + j * members;
        statistic[j] = PieceSum::nothing();
        if (part < split.parts) {
          statistic[j] = statistics(copies)[part * 8];
          packed[j] = values(copies, piece)[part * copies.count * 32];
          factor[j] = factors(copies, piece)[part * copies.sets() * 8];
        }
      }
      sum.add_statistics(statistic, weight);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * members >= split.parts) break;
        add_packed(sum.value[0], sum.value[1], packed[j], weight[j].x * factor[j].x, weight[j].y * factor[j].y);
      }
    }
    MLA_TRACE_IN(params_, 13);
    float4* given = reinterpret_cast<float4*>(smem_ + L::kExchange) + warp * 96 + lane;
    given[0] = sum.statistics();
    given[32] = sum.value[0];
    given[64] = sum.value[1];
    named_sync(kAddBarrier + piece, 32 * members);
    if (member > 0) return;
    sum = add_members(given, members);
    if (split.mine == 0 && piece == 0) store_lse(split.item, sum);
    store(rows, copies.begin + piece, sum.value, sum.inverse());
  }

  // What the warps of a team have left, this one's at `given`.
  static __device__ __forceinline__ PieceSum add_members(const float4* given, int members) {
    float4 statistic[kWarps];
    float2 weight[kWarps];
    PieceSum sum;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) statistic[i] = i < members ? given[i * 96] : PieceSum::nothing();
    sum.add_statistics(statistic, weight);
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i >= members) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) add_weighted(sum.value[half], weight[i], given[i * 96 + 32 + 32 * half]);
    }
    return sum;
  }

  // One warp: of all rows.
  __device__ __forceinline__ void store_lse(int item, const PieceSum& sum) const {
    if (thread_ & 3) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mla_hopper::store_lse(params_, row_table<L>(smem_), item, (thread_ / 4 & 7) + 8 * i, sum.maximum[i], sum.total[i]);
    }
  }

  __device__ __forceinline__ void store(const RowPair<T>& rows, int piece, const float4 (&sum)[2], const float2& inverse) const {
    float4 value[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      value[i] = make_float4(sum[i].x * inverse.x, sum[i].y * inverse.x, sum[i].z * inverse.y, sum[i].w * inverse.y);
    }
    Operands::store_chunks(rows, piece, thread_ & 31, value[0], value[1]);
  }

  const Params& params_;
  char* smem_;
  uint32_t barrier_;
  int thread_;
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_MERGE_CUH_
