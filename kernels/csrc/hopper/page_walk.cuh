// The pages of a group's tiles, one after another, for a warp that asks for tokens ahead of those who work on them.
#ifndef MLA_HOPPER_PAGE_WALK_CUH_
#define MLA_HOPPER_PAGE_WALK_CUH_

#include "schedule.cuh"

namespace mla_hopper {

// Uniform over the warp but for `pages_`.
class PageWalk {
 public:
  __device__ __forceinline__ PageWalk(const Params& params, Schedule& schedule, int lane)
      : params_(params), schedule_(schedule), lane_(lane) {
    open_item();
  }
  __device__ __forceinline__ bool valid() const { return tile_ < work_.last; }
  __device__ __forceinline__ int page() const { return __shfl_sync(kAllLanes, pages_, (tile_ - work_.first) & 31); }
  __device__ __forceinline__ uint32_t seen() const { return seen_; }  // tiles up to the present one
  // Whether an item begins with this tile, the present one or one of the 31 before it.
  __device__ __forceinline__ bool begins(uint32_t tile) const { return first_tiles_ >> (tile & 31) & 1; }
  __device__ __forceinline__ void advance() {
    if (!valid()) return;
    if (++tile_ == work_.last) {
      open_item();
      return;
    }
    first_tiles_ &= ~(1u << (seen_ & 31));
    ++seen_;
    if (((tile_ - work_.first) & 31) == 0) load_pages();
  }

 private:
  __device__ __forceinline__ void open_item() {
    if (!schedule_.next(work_)) return;
    tile_ = work_.first;
    first_tiles_ |= 1u << (seen_ & 31);
    ++seen_;
    load_pages();
  }
  __device__ __forceinline__ void load_pages() {
    const int32_t* pages = params_.block_table + work_.item * params_.block_table_stride;
    pages_ = tile_ + lane_ < work_.last ? pages[tile_ + lane_] : 0;
  }

  const Params& params_;
  Schedule& schedule_;
  Work work_ = {};
  int lane_, tile_ = 0, pages_ = 0;
  uint32_t seen_ = 0, first_tiles_ = 0;
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PAGE_WALK_CUH_
