// The ring's producers for the fp8_ds_mla cache: raw tokens by bulk copies, then e4m3 and scales to bfloat16 in the very
// layout that the copy engine gives a 16-bit cache. One warpgroup: a warp unpacks 16 tokens of each tile, piece by piece as
// the ring has room, and shares nothing with the other three but the places they fill.
#ifndef MLA_HOPPER_RING_UNPACK_CUH_
#define MLA_HOPPER_RING_UNPACK_CUH_

#include <cuda_bf16.h>

#include "codes.cuh"
#include "page_walk.cuh"
#include "ring.cuh"

namespace mla_hopper {

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

// Four of a warp's 16 tokens, of one scale block, which is a piece: a lane takes 16 codes of one of them. That they are r,
// r + 1, r + 8 and r + 9, and the order in which a lane goes through its codes, keep reads and writes free of bank conflicts.
struct RawStep {
  uint32_t codes[2][2];
  float scale;

  // Where the lane's token lies in the warp's 16, and the first of its codes in the token's block.
  static __device__ __forceinline__ uint32_t token(int lane) { return lane / 16 + (lane & 8); }
  static __device__ __forceinline__ uint32_t first(int lane) { return (lane & 7) * 16 + second_first(lane) * 8; }
  // Where what becomes of them lies in a pair of slabs, from the warp's rows on.
  static __device__ __forceinline__ uint32_t place(int lane) {
    const int unit = 2 * (lane & 3) + second_first(lane);
    return (lane & 7) / 4 * kSlabBytes + token(lane) * 128 + ((unit ^ (lane / 16)) << 4);
  }

  __device__ __forceinline__ void load(uint32_t codes_at, uint32_t scale_at) {
    load_shared(codes[0], codes_at);
    load_shared(codes[1], codes_at ^ 8);
    scale = load_shared<float>(scale_at);
  }

  __device__ __forceinline__ void unpack(uint32_t place) const {
    const Scale times(scale);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t value[4];
      value[0] = times(shifted_codes(byte_pair<0, 1>(codes[j][0], codes[j][0])));
      value[1] = times(shifted_codes(byte_pair<2, 3>(codes[j][0], codes[j][0])));
      value[2] = times(shifted_codes(byte_pair<0, 1>(codes[j][1], codes[j][1])));
      value[3] = times(shifted_codes(byte_pair<2, 3>(codes[j][1], codes[j][1])));
      store_shared(place ^ (j << 4), value);
    }
  }

 private:
  // 1: the lane takes the second eight of its codes first.
  static __device__ __forceinline__ int second_first(int lane) { return (lane >> 2 ^ lane >> 3) & 1; }
};

// The rope of a warp's 16 tokens, as it is.
struct RawRope {
  uint32_t value[4][4];

  __device__ __forceinline__ void load(uint32_t raw) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_shared(value[i], raw + (4 * i + lane / 8) * kTokenBytesFp8 + kLatent + 16 + (lane & 7) * 16);
    }
  }

  __device__ __forceinline__ void store(uint32_t slab, int warp) const {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * warp + 4 * i + lane / 8;
      store_shared(slab + token * 128 + (((lane & 7) ^ (token & 7)) << 4), value[i]);
    }
  }
};

// What this warp has written is there for the tensor cores.
__device__ __forceinline__ void announce(uint32_t full, int lane) {
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(full);
}

// Raw slot q % kRawSlots holds the q-th 16 tokens of the group's stream; the warp that has read them refills it.
template <typename L>
__device__ __forceinline__ void fill_raw_slot(const Params& params, const RingBarriers<L>& barriers, uint32_t base,
                                              const PageWalk& walk, int quarter, int slot, uint64_t policy, int lane) {
  const int page = walk.page();  // gathers the warp: all have read what was there
  if (walk.valid() && lane == 0) {
    mbarrier_expect(barriers.raw_full(slot), kRawBytes);
    bulk_copy(base + L::kRaw + slot * kRawBytes, params.raw_cache + page * params.raw_stride + quarter * kRawBytes,
              kRawBytes, barriers.raw_full(slot), policy);
  }
}

template <typename L>
__device__ __forceinline__ void unpack_ring(const Params& params, Schedule& schedule, const RingBarriers<L>& barriers,
                                            uint32_t base, int warp, int lane) {
  static_assert(4 <= L::kRawSlots && L::kRawSlots <= 8, "a warp fills one or two slots at first");
  const uint64_t policy = schedule.cache_policy();
  PageWalk walk(params, schedule, lane);
  // The walk stays kRawSlots quarters ahead.
  fill_raw_slot(params, barriers, base, walk, warp, warp, policy, lane);
  int ahead = 0;
  if (warp + 4 < L::kRawSlots) {
    walk.advance();
    ahead = 1;
    fill_raw_slot(params, barriers, base, walk, warp, warp + 4, policy, lane);
  }
#pragma unroll 1
  for (; ahead < (warp + L::kRawSlots) / 4; ++ahead) walk.advance();

  RingPosition<L> position;
  int slot = warp;
  uint32_t parity = 0;
  // The walk has seen the end when the last tile is done.
#pragma unroll 1
  for (uint32_t tile = 0; tile < walk.seen(); ++tile) {
    const uint32_t raw = base + L::kRaw + slot * kRawBytes;
    if (L::kRawSlots % 4 != 0 && tile > 0) {
      // The slot was another warp's. That one's phase may not be over, and parity does not tell it from the phase after this
      // one. The last tile's first piece, full, says that all warps have waited for it.
      const RingPosition<L> last = position.behind(kTilePairs);
      mbarrier_wait(barriers.full(last.slot), last.parity);
    }
    if (walk.begins(tile)) position.advance(L::kHeldPairs);  // the query's pieces
    mbarrier_wait(barriers.raw_full(slot), parity);
    uint32_t filled = 0;  // a piece that is written but not announced: a fence waits for writes, so other work comes first
#pragma unroll 1
    for (int pair = 0; pair < kTilePairs; ++pair) {
      uint32_t codes_at = raw + pair_slab(pair) * 64 + RawStep::token(lane) * kTokenBytesFp8 + RawStep::first(lane);
      uint32_t scale_at = raw + pair_slab(pair) * 2 + RawStep::token(lane) * kTokenBytesFp8 + kLatent;
      RawStep next;
      next.load(codes_at, scale_at);
      if (pair > 0) announce(filled, lane);
      mbarrier_wait(barriers.empty(position.slot), position.parity ^ 1);
      const uint32_t place = position.address(base) + 16 * warp * 128 + RawStep::place(lane);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const RawStep now = next;
        codes_at += 2 * kTokenBytesFp8;
        scale_at += 2 * kTokenBytesFp8;
        if (step < 3) next.load(codes_at, scale_at);
        now.unpack((place ^ (step << 5)) + 256 * step);
      }
      filled = barriers.full(position.slot);
      position.advance(1);
    }
    RawRope rope;
    rope.load(raw);
    announce(filled, lane);
    fill_raw_slot(params, barriers, base, walk, (warp + L::kRawSlots) & 3, slot, policy, lane);
    mbarrier_wait(barriers.rope_empty(), (tile & 1) ^ 1);
    rope.store(base + L::kRope, warp);
    walk.advance();
    announce(barriers.rope_full(), lane);
    slot += 4;
    if (slot >= L::kRawSlots) {
      slot -= L::kRawSlots;
      parity ^= 1;
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_RING_UNPACK_CUH_
