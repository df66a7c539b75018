// Who computes what, from the lengths, inside the kernel.
//
// The cache of the whole batch is one line of 64-token tiles, item after item. The line is cut into equal pieces, one
// for each group of `m_tiles` CTAs (one for each 16 or 64 query rows, so that those sharing cache tiles run
// side by side and meet in L2). An item that a cut goes through is computed in parts and merged afterwards (merge.cuh). Where it costs
// little, the pieces are made a bit longer so that cuts and items' ends coincide.
#ifndef MLA_HOPPER_SCHEDULE_CUH_
#define MLA_HOPPER_SCHEDULE_CUH_

#include "params.cuh"
#include "ptx.cuh"

namespace mla_hopper {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Parts of an item, or one more where cuts and items' ends do not coincide.
constexpr int kMostParts = 64;

// Tokens of an item that the block table can address, whatever the caller says.
__device__ __forceinline__ int clamped_length(const Params& params, int length) {
  return max(0, min(length, params.max_length));
}

__device__ __forceinline__ int tile_count(int length) { return (length + kTileTokens - 1) / kTileTokens; }

// One part of one item: tiles [first, last) of its `tiles`.
struct Work {
  int item;
  int length;      // tokens in the item's cache
  int tiles;       // all tiles of the item
  int first, last;
  int head_group;  // first group that works on the item
  int part;        // of this group
  int parts;       // groups that work on the item
};

// Quotients of numbers that are not negative by one divisor, without an integer division's hundred instructions each. The
// product is off by less than 1 while quotients are less than 2^20.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(int value)
      : value_(value), reciprocal_(reciprocal_approximate(static_cast<float>(value))) {}
  __device__ __forceinline__ int floor(int x) const {
    const int quotient = static_cast<int>(static_cast<float>(x) * reciprocal_);
    const int rest = x - quotient * value_;
    return quotient + (rest >= value_) - (rest < 0);
  }
  __device__ __forceinline__ int ceil(int x) const { return floor(x + value_ - 1); }

 private:
  int value_;
  float reciprocal_;
};

// Every warp of a CTA walks its own copy; all members are uniform over the warp except `lane_length`.
class Schedule {
 public:
  // The lengths that the constructor needs first: all asked for at once, and early, memory answers while other things are
  // made ready.
  struct FirstLengths {
    static constexpr int kCount = 4;
    int value[kCount];  // of items lane + 32 i
    __device__ __forceinline__ FirstLengths(const Params& params, int lane) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] = lane + 32 * i < params.batch ? params.lengths[lane + 32 * i] : 0;
    }
  };

  __device__ __forceinline__ Schedule(const Params& params, int group, int lane)
      : Schedule(params, group, lane, FirstLengths(params, lane)) {}

  __device__ __forceinline__ Schedule(const Params& params, int group, int lane, const FirstLengths& first)
      : params_(params), lane_(lane), lane_length_(clamped(first.value[0])) {
    int total = 0, longest = 0, shortest = 1 << 30;
#pragma unroll
    for (int i = 0; i < FirstLengths::kCount; ++i) {
      const int tiles = tile_count(clamped(first.value[i]));
      total += tiles;
      longest = max(longest, tiles);
      if (lane + 32 * i < params.batch) shortest = min(shortest, tiles);
    }
#pragma unroll 1
    for (int i = lane + 32 * FirstLengths::kCount; i < params.batch; i += 32) {
      const int tiles = tile_count(item_length(i));
      total += tiles;
      longest = max(longest, tiles);
      shortest = min(shortest, tiles);
    }
    total = __reduce_add_sync(kAllLanes, total);
    longest = __reduce_max_sync(kAllLanes, longest);
    shortest = __reduce_min_sync(kAllLanes, shortest);
    has_empty_items = shortest == 0;
    total_ = total;
    // Merging costs time for every part, so a long item is not cut into single tiles.
    const int least = max(longest > params.most_parts ? max(2, params.min_tiles) : params.min_tiles,
                          (longest + kMostParts - 1) / kMostParts);
    // Half of the groups where they are as fast: nothing is left to merge.
    int groups = params.groups;
    if (2 * params.batch <= groups && 3 * params.batch > groups) {
      if (longest <= params.whole_below && longest * params.batch <= total + total / 4) groups /= 2;
    }
    shared_by_all = params.m_tiles == 1 && groups == params.groups;
    const Divisor all_groups(groups);
    per_group_ = max(all_groups.ceil(total), least);
    if (params.batch <= groups) {
      // Enough groups to start every item at a group of its own: no CTA then has two parts to load, store and merge.
      const Divisor share(Divisor(params.batch).floor(groups));
      const int own = max(share.ceil(longest), least);
      // A few CTAs without work cost nothing while memory is the limit.
      aligned_ = own <= per_group_ + max(own >= longest ? params.split_cost : 1, per_group_ / 32);
      if (aligned_) per_group_ = own;
    } else if (shortest == longest) {
      const int whole = longest * all_groups.ceil(params.batch);
      if (whole <= per_group_ + params.split_cost) per_group_ = whole;
    }
    position_ = group * per_group_;
    end_ = position_ + per_group_;
    if (!aligned_) end_ = min(end_, total);
    item_ = -1;
    if (position_ < end_) find_item();
    if (item_ < 0) end_ = position_;
  }

  // The next part of this group's piece; false at its end.
  __device__ __forceinline__ bool next(Work& work) {
    if (position_ >= end_) return false;
    int length = length_of(item_);
    while (length == 0) length = length_of(++item_);
    work.item = item_;
    work.length = length;
    work.tiles = tile_count(length);
    work.first = position_ - item_start_;
    work.last = min(work.tiles, end_ - item_start_);
    const Divisor per_group(per_group_);
    work.head_group = per_group.floor(item_start_);
    work.parts = per_group.floor(item_start_ + work.tiles - 1) - work.head_group + 1;
    work.part = per_group.floor(position_) - work.head_group;
    position_ = aligned_ ? end_ : item_start_ + work.last;
    if (work.last == work.tiles) {
      item_start_ += work.tiles;
      ++item_;
    }
    return true;
  }

  // After next(): whether that was the last one.
  __device__ __forceinline__ bool at_end() const { return position_ >= end_; }

  __device__ __forceinline__ int item_length(int item) const {
    return clamped(params_.lengths[item]);
  }

  // Tiles are read once, but for the CTAs that share them and do so at about the same time: they need no place in L2. When
  // there are many, memory was faster without the hint.
  __device__ __forceinline__ uint64_t cache_policy() const {
    return total_ <= (params_.m_tiles == 1 ? 2048 : 4096) ? kReadOnce : kNormal;
  }

  bool has_empty_items;
  bool shared_by_all;  // every group has a share of the tiles, and reads it alone: memory is the limit by far

 private:
  __device__ __forceinline__ int clamped(int length) const { return clamped_length(params_, length); }

  __device__ __forceinline__ void load_chunk(int chunk) {
    chunk_ = chunk;
    lane_length_ = chunk + lane_ < params_.batch ? item_length(chunk + lane_) : 0;
  }

  // The item that position_ lies in.
  __device__ __forceinline__ void find_item() {
    const Divisor per_group(per_group_);
    int before = 0;  // tiles of the items before this chunk of 32
#pragma unroll 1
    for (int chunk = 0; chunk < params_.batch; chunk += 32) {
      if (chunk > 0) load_chunk(chunk);
      int mine = tile_count(lane_length_);
      if (aligned_) mine = per_group.ceil(mine) * per_group_;
      int inclusive = mine;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, inclusive, offset);
        if (lane_ >= offset) inclusive += other;
      }
      const unsigned reached = __ballot_sync(kAllLanes, before + inclusive > position_);
      if (reached != 0) {
        const int found = __ffs(reached) - 1;
        item_ = chunk + found;
        item_start_ = before + __shfl_sync(kAllLanes, inclusive - mine, found);
        return;
      }
      before += __shfl_sync(kAllLanes, inclusive, 31);
    }
  }

  __device__ __forceinline__ int length_of(int item) {
    if (item >= chunk_ + 32) load_chunk(item & ~31);
    return __shfl_sync(kAllLanes, lane_length_, item & 31);
  }

  const Params& params_;
  int lane_;
  int lane_length_;  // length of item chunk_ + lane
  int chunk_ = 0;
  bool aligned_ = false;
  int total_;
  int per_group_;  // tiles of a group's piece
  int position_, end_;
  int item_, item_start_ = 0;
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_SCHEDULE_CUH_
