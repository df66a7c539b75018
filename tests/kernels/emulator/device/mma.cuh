// Stands for kernels/csrc/hopper/mma.cuh.
#ifndef MLA_HOPPER_MMA_CUH_
#define MLA_HOPPER_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace mla_hopper {

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16,
                emulator::Place place = emulator::Place::here()) {
  emulator::multiply_fragments(emulator::Element::kBfloat16, d, a, b0, b1, place);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half,
                emulator::Place place = emulator::Place::here()) {
  emulator::multiply_fragments(emulator::Element::kFloat16, d, a, b0, b1, place);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_MMA_CUH_
