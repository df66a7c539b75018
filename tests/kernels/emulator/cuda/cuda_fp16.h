// float16 as cuda_fp16.h has it.
#ifndef EMULATOR_CUDA_FP16_H_
#define EMULATOR_CUDA_FP16_H_

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct __align__(4) __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {{static_cast<_Float16>(x)}, {static_cast<_Float16>(y)}};
}

#endif  // EMULATOR_CUDA_FP16_H_
