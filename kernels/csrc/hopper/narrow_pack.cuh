// The sums that CTAs of a cluster send each other, in 16 bits: float16 with a power of two common to a warp's, which brings
// the largest to [2^14, 2^15). So they are off by 2^-12 of themselves at most (an eighth of what rounding the output to
// bfloat16 costs), and by less than 2^-39 of the warp's largest where they are small. Unlike parts in the workspace
// (part_pack.cuh) they can be sent only once, so the scale is known first.
#ifndef MLA_HOPPER_NARROW_PACK_CUH_
#define MLA_HOPPER_NARROW_PACK_CUH_

#include "part_pack.cuh"

namespace mla_hopper {

// What a warp's sums are multiplied with before and after.
struct PackScale {
  float to, from;

  // From the largest magnitude's bits, the exponent of which is the upper ones.
  __device__ __forceinline__ explicit PackScale(uint32_t largest) {
    const uint32_t exponent = min(254 + 14 - (largest >> 23), 253u);
    to = __uint_as_float(exponent << 23);
    from = __uint_as_float((254 - exponent) << 23);
  }

  // Of the sums of all lanes. Those that are not finite stay so at any scale, and say nothing of the others'.
  template <int kCount>
  static __device__ __forceinline__ PackScale of(const float (&sum)[kCount][4]) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) largest = fmaxf(largest, fabsf(sum[i / 4][i % 4]));  // passes a NaN over
    uint32_t bits = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest));
    if (bits == __float_as_uint(INFINITY)) {
      largest = 0.f;
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) {
        const float one = fabsf(sum[i / 4][i % 4]);
        if (one < INFINITY) largest = fmaxf(largest, one);
      }
      bits = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest));
    }
    return PackScale(bits);
  }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_PACK_CUH_
