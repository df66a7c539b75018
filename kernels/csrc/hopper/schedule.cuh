// Who computes what, from the lengths, inside the kernel.
//
// The cache of the whole batch is one line of 64-token tiles, item after item. The line is cut into equal pieces, one
// for each group of `m_tiles` CTAs (one CTA for each 64 query rows, so that CTAs sharing cache tiles run side by side
// and meet in L2). An item that a cut goes through is computed in parts and merged afterwards (merge.cuh).
#ifndef MLA_HOPPER_SCHEDULE_CUH_
#define MLA_HOPPER_SCHEDULE_CUH_

#include "params.cuh"

namespace mla_hopper {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }

// One part of one item: tiles [first, last) of its `tiles`.
struct Work {
  int item;
  int length;      // tokens in the item's cache
  int tiles;       // all tiles of the item
  int first, last;
  int head_group;  // first group that works on the item
  int parts;       // groups that work on the item
};

// Every warp of a CTA walks its own copy; all members are uniform over the warp except `lane_length`.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const Params& params, int group, int lane) : params_(params), lane_(lane) {
    int total = 0;
    int empty = 0;
#pragma unroll 4
    for (int i = lane; i < params.batch; i += 32) {
      const int length = item_length(i);
      total += tile_count(length);
      empty |= length == 0;
    }
    total = warp_sum(total);
    has_empty_items = __any_sync(kAllLanes, empty);
    const int even = (total + params.groups - 1) / params.groups;
    tiles_per_group_ = even > params.min_tiles ? even : params.min_tiles;
    position_ = group * tiles_per_group_;
    end_ = min(position_ + tiles_per_group_, total);
    item_ = params.batch;
    if (position_ >= end_) return;
    int before = 0;  // tiles of the items before this chunk of 32
    for (int chunk = 0; chunk < params.batch; chunk += 32) {
      load_chunk(chunk);
      const int mine = tile_count(lane_length_);
      int inclusive = mine;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      const unsigned reached = __ballot_sync(kAllLanes, before + inclusive > position_);
      if (reached != 0) {
        const int found = __ffs(reached) - 1;
        item_ = chunk + found;
        item_start_ = before + __shfl_sync(kAllLanes, inclusive - mine, found);
        break;
      }
      before += __shfl_sync(kAllLanes, inclusive, 31);
    }
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
    work.head_group = item_start_ / tiles_per_group_;
    work.parts = (item_start_ + work.tiles - 1) / tiles_per_group_ - work.head_group + 1;
    position_ = item_start_ + work.last;
    if (work.last == work.tiles) {
      item_start_ += work.tiles;
      ++item_;
    }
    return true;
  }

  __device__ __forceinline__ int item_length(int item) const {
    return max(0, min(params_.lengths[item], params_.max_length));
  }

  bool has_empty_items;

 private:
  static __device__ __forceinline__ int tile_count(int length) { return (length + kTileTokens - 1) / kTileTokens; }

  __device__ __forceinline__ void load_chunk(int chunk) {
    chunk_ = chunk;
    lane_length_ = chunk + lane_ < params_.batch ? item_length(chunk + lane_) : 0;
  }

  __device__ __forceinline__ int length_of(int item) {
    if (item >= chunk_ + 32) load_chunk(item & ~31);
    return __shfl_sync(kAllLanes, lane_length_, item & 31);
  }

  const Params& params_;
  int lane_;
  int lane_length_ = 0;  // length of item chunk_ + lane
  int chunk_ = 0;
  int tiles_per_group_, position_, end_;
  int item_, item_start_ = 0;
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_SCHEDULE_CUH_
