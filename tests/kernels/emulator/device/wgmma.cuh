// Stands for kernels/csrc/hopper/wgmma.cuh.
#ifndef MLA_HOPPER_WGMMA_CUH_
#define MLA_HOPPER_WGMMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#include "descriptor.cuh"

namespace mla_hopper {

using emulator::Place;

inline void wgmma_fence(Place place = Place::here()) { emulator::wgmma_fence(place); }
inline void wgmma_commit(Place place = Place::here()) { emulator::wgmma_commit(place); }
template <int kPending>
void wgmma_wait(Place place = Place::here()) {
  emulator::wgmma_wait(kPending, place);
}

template <typename T>
struct Wgmma {
  static constexpr emulator::Element kElement =
      std::is_same_v<T, __half> ? emulator::Element::kFloat16 : emulator::Element::kBfloat16;

  static void scores(float (&d)[32], uint64_t a, uint64_t b, int accumulate, Place place = Place::here()) {
    emulator::wgmma({kElement, 64, d, a, nullptr, b, false, accumulate != 0}, place);
  }
  static void scores(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate, Place place = Place::here()) {
    emulator::wgmma({kElement, 64, d, 0, a, b, false, accumulate != 0}, place);
  }
  template <int kFirst>
  static void values(float (&d)[128], uint64_t a, uint64_t b, int accumulate, Place place = Place::here()) {
    emulator::wgmma({kElement, 128, d + kFirst, a, nullptr, b, true, accumulate != 0}, place);
  }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_WGMMA_CUH_
