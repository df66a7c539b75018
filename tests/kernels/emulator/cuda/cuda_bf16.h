// bfloat16 as cuda_bf16.h has it: results are rounded once, to nearest even.
#ifndef EMULATOR_CUDA_BF16_H_
#define EMULATOR_CUDA_BF16_H_

#include <math.h>
#include <stdint.h>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
// By way of float, rounded to odd so that the second rounding sees what the first cut off.
inline __nv_bfloat16 emulated_double2bfloat16(double x) {
  float nearest = static_cast<float>(x);
  if (nearest != x && isfinite(x)) {
    if (fabs(double(nearest)) > fabs(x)) nearest = nextafterf(nearest, 0.f);
    uint32_t bits = __float_as_uint(nearest) | 1;
    memcpy(&nearest, &bits, 4);
  }
  return __float2bfloat16_rn(nearest);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
// Products of two bfloat16 are exact in double; so are their sums with a third, but for what lies 2^37 below.
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {emulated_double2bfloat16(double(__bfloat162float(a.x)) * __bfloat162float(b.x) + __bfloat162float(c.x)),
          emulated_double2bfloat16(double(__bfloat162float(a.y)) * __bfloat162float(b.y) + __bfloat162float(c.y))};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hfma2(a, b, __nv_bfloat162{{0x8000}, {0x8000}});  // -0 changes no product
}

#endif  // EMULATOR_CUDA_BF16_H_
