// The producer side for the fp8_ds_mla cache and more than 16 query rows: raw tokens by bulk copies into a ring, then
// e4m3 and scales to bfloat16 in the very layout that the copy engine gives a 16-bit cache, so that the consumers are the
// same. One warpgroup; its warps share nothing but the stage they fill.
#ifndef MLA_HOPPER_UNPACK_CUH_
#define MLA_HOPPER_UNPACK_CUH_

#include <cuda_bf16.h>

#include "barriers.cuh"
#include "codes.cuh"
#include "schedule.cuh"

namespace mla_hopper {

// The pages of a group's tiles, one after another. Uniform over the warp but for `pages_`.
class PageWalk {
 public:
  __device__ __forceinline__ PageWalk(const Params& params, const Schedule& schedule, int lane)
      : params_(params), schedule_(schedule), lane_(lane) {
    open_item();
  }
  __device__ __forceinline__ bool valid() const { return valid_; }
  __device__ __forceinline__ int page() const { return __shfl_sync(kAllLanes, pages_, (tile_ - work_.first) & 31); }
  __device__ __forceinline__ uint32_t seen() const { return seen_; }  // tiles up to the present one
  __device__ __forceinline__ void advance() {
    if (!valid_) return;
    if (++tile_ == work_.last) {
      open_item();
      return;
    }
    ++seen_;
    if (((tile_ - work_.first) & 31) == 0) load_pages();
  }

 private:
  __device__ __forceinline__ void open_item() {
    valid_ = schedule_.next(work_);
    tile_ = work_.first;
    if (!valid_) return;
    ++seen_;
    load_pages();
  }
  __device__ __forceinline__ void load_pages() {
    const int32_t* pages = params_.block_table + work_.item * params_.block_table_stride;
    pages_ = tile_ + lane_ < work_.last ? pages[tile_ + lane_] : 0;
  }

  const Params& params_;
  Schedule schedule_;
  Work work_ = {};
  int lane_, tile_ = 0, pages_ = 0;
  uint32_t seen_ = 0;
  bool valid_ = false;
};

// A scale as the sum of two bfloat16, 16 bits of it, so that only the product with a code is rounded: with a 4-bit mantissa
// it is exact in the fused multiply-add. A scale of 256 or more becomes infinite.
struct Scale {
  __nv_bfloat162 high, low;
  __device__ __forceinline__ explicit Scale(float scale) {
    const float scaled = scale * 0x1p120f;
    high = top_halves(scaled);
    low = top_halves(scaled - __bfloat162float(high.x));
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t codes) const {
    const __nv_bfloat162 value = reinterpret_cast<const __nv_bfloat162&>(codes);
    const __nv_bfloat162 product = __hfma2(value, high, __hmul2(value, low));
    return reinterpret_cast<const uint32_t&>(product);
  }

 private:
  static __device__ __forceinline__ __nv_bfloat162 top_halves(float x) {  // truncated
    const uint32_t pair = __byte_perm(__float_as_uint(x), 0, 0x3232);
    return reinterpret_cast<const __nv_bfloat162&>(pair);
  }
};

// Raw slot q % kRawSlots holds the q-th 16 tokens of the group's stream; the warp that has read them refills it.
template <typename L>
__device__ __forceinline__ void fill_slot(const Params& params, const Barriers<L>& barriers, uint32_t base, int page,
                                          int quarter, uint32_t slot, uint64_t policy, int lane) {
  if (lane == 0) {
    mbarrier_expect(barriers.raw_full(slot), kRawBytes);
    bulk_copy(base + L::kRaw + slot * kRawBytes, params.raw_cache + page * params.raw_stride + quarter * kRawBytes,
              kRawBytes, barriers.raw_full(slot), policy);
  }
}

// One piece of a stage for this warp's 16 tokens: the rope as it is.
__device__ __forceinline__ void copy_rope(char* stage, const uint8_t* raw, int warp, int lane) {
  uint4 value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] = *reinterpret_cast<const uint4*>(raw + (4 * i + lane / 8) * kTokenBytesFp8 + kLatent + 16 + (lane & 7) * 16);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 16 * warp + 4 * i + lane / 8;
    *reinterpret_cast<uint4*>(stage + 8 * kSlabBytes + token * 128 + (((lane & 7) ^ (token & 7)) << 4)) = value[i];
  }
}

// Two slabs, which are one scale block: half a warp takes a token, a lane 8 of its codes.
__device__ __forceinline__ void unpack_block(char* stage, const uint8_t* raw, int block, int warp, int lane) {
  const int half = lane / 16;
  const int unit = lane & 7;
  const uint8_t* codes = raw + half * kTokenBytesFp8 + block * 128 + (lane & 15) * 8;
  const uint8_t* scales = raw + half * kTokenBytesFp8 + kLatent + block * 4;
  uint2 word[8];
  float scale[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    word[i] = *reinterpret_cast<const uint2*>(codes + 2 * i * kTokenBytesFp8);
    scale[i] = *reinterpret_cast<const float*>(scales + 2 * i * kTokenBytesFp8);
  }
  const uint32_t place = shared_address(stage) + (2 * block + (lane & 15) / 8) * kSlabBytes + (16 * warp + half) * 128 +
                         ((unit ^ half) << 4);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Scale times(scale[i]);
    uint32_t value[4];
    value[0] = times(shifted_codes(byte_pair<0, 1>(word[i].x, word[i].x)));
    value[1] = times(shifted_codes(byte_pair<2, 3>(word[i].x, word[i].x)));
    value[2] = times(shifted_codes(byte_pair<0, 1>(word[i].y, word[i].y)));
    value[3] = times(shifted_codes(byte_pair<2, 3>(word[i].y, word[i].y)));
    store_shared((place ^ ((2 * i & 6) << 4)) + 256 * i, value);
  }
}

template <typename L>
__device__ __forceinline__ void unpack_cache(const Params& params, Schedule& schedule, const Barriers<L>& barriers,
                                             char* smem, uint32_t base, int thread) {
  static_assert(L::kUnpackers == 128 && L::kRawSlots == 7 && L::kStages == 1,
                "who fills which slot, and when it is read, is worked out for these");
  const int lane = thread & 31;
  const int warp = thread / 32;
  const uint64_t policy = schedule.cache_policy();
  PageWalk walk(params, schedule, lane);
  // Quarter `warp` of tile 0, and of tile 1 but for the last; slot 0 gets that one, as soon as it is free.
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const int page = walk.page();
    if (walk.valid() && (i == 0 || warp < 3)) {
      fill_slot(params, barriers, base, page, warp, warp + 4 * i, policy, lane);
    }
    if (i == 0 || warp > 0) walk.advance();
  }
  uint32_t slot = warp, parity = 0;
  // The walk is ahead, so it has seen the end when the last tile is done.
#pragma unroll 1
  for (uint32_t tile = 0; tile < walk.seen(); ++tile) {
    const uint32_t stage = tile % L::kStages;
    const uint32_t free = (tile / L::kStages & 1) ^ 1;
    char* destination = smem + L::kCache + stage * kTileBytes;
    const uint8_t* raw = reinterpret_cast<const uint8_t*>(smem) + L::kRaw + slot * kRawBytes;
    // What warp 3's slot held before is warp 0's quarter of the last tile. That may still be on its way, and waiting for
    // the phase after it would return at once. An empty stage says that all warps have read the last tile.
    mbarrier_wait(barriers.empty(stage, 0), free);
    mbarrier_wait(barriers.raw_full(slot), parity);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      mbarrier_wait(barriers.empty(stage, piece), free);
      if (piece == kPieceRope) {
        copy_rope(destination, raw, warp, lane);
      } else {
        unpack_block(destination, raw, first_slab(piece) / 2, warp, lane);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.full(stage, piece));
    }
    const int page = walk.page();
    if (walk.valid()) fill_slot(params, barriers, base, page, (warp + 3) & 3, slot, policy, lane);
    walk.advance();
    slot += 4;
    if (slot >= L::kRawSlots) {
      slot -= L::kRawSlots;
      parity ^= 1;
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_UNPACK_CUH_
