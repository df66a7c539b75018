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

#endif  // EMULATOR_CUDA_FP16_H_
