// float16 as cuda_fp16.h has it.
#ifndef EMULATOR_CUDA_FP16_H_
#define EMULATOR_CUDA_FP16_H_

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __align__(4) __half2 {
  __half x, y;
};

// To nearest even. What is subnormal in float16 is rounded by adding 0.5, whose last bit is float16's.
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = bits >> 16 & 0x8000;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7FFF;
  } else if (magnitude >= 0x477FF000) {  // 65520 and more
    half = 0x7C00;
  } else if (magnitude < 0x38800000) {  // 2^-14
    half = __float_as_uint(fabsf(x) + 0.5f) - 0x3F000000;
  } else {
    half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

inline float __half2float(__half x) {
  const uint32_t magnitude = x.bits & 0x7FFF, sign = uint32_t(x.bits & 0x8000) << 16;
  if (magnitude >= 0x7C00) return __uint_as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;  // subnormal ones too
  return sign ? -value : value;
}
inline __half2 __habs2(__half2 x) {
  return {{static_cast<uint16_t>(x.x.bits & 0x7FFF)}, {static_cast<uint16_t>(x.y.bits & 0x7FFF)}};
}
// Of a number and NaN the number.
inline __half __hmax(__half x, __half y) {
  const bool x_is_nan = (x.bits & 0x7FFF) > 0x7C00, y_is_nan = (y.bits & 0x7FFF) > 0x7C00;
  if (x_is_nan && y_is_nan) return {0x7FFF};
  return y_is_nan || __half2float(x) > __half2float(y) ? x : y;
}
inline __half2 __hmax2(__half2 x, __half2 y) { return {__hmax(x.x, y.x), __hmax(x.y, y.y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

#endif  // EMULATOR_CUDA_FP16_H_
