// The part of CUDA's language and runtime that the Hopper kernels use, for a host compiler.
#ifndef EMULATOR_CUDA_RUNTIME_H_
#define EMULATOR_CUDA_RUNTIME_H_

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cuda.h"
#include "runtime/interface.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__  // the machine maps a CTA's memory there while it runs (memory.cc)
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
constexpr unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// Warp functions.
template <typename T>
T emulated_shuffle(emulator::Shuffle kind, unsigned mask, T value, int operand, emulator::Place place) {
  static_assert(sizeof(T) == 4, "one register");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = emulator::shuffle(kind, mask, bits, operand, place);
  memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, emulator::Place place = emulator::Place::here()) {
  return emulated_shuffle(emulator::Shuffle::kIndex, mask, value, lane, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int offset, emulator::Place place = emulator::Place::here()) {
  return emulated_shuffle(emulator::Shuffle::kUp, mask, value, offset, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, emulator::Place place = emulator::Place::here()) {
  return emulated_shuffle(emulator::Shuffle::kXor, mask, value, bits, place);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::ballot(mask, predicate, place);
}
inline bool __all_sync(unsigned mask, bool predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::ballot(mask, predicate, place) == ~0u;
}
inline bool __any_sync(unsigned mask, bool predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::ballot(mask, predicate, place) != 0;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, emulator::Place place = emulator::Place::here()) {
  return static_cast<T>(emulator::reduce(emulator::Reduction::kAdd, mask, value, place));
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, emulator::Place place = emulator::Place::here()) {
  return static_cast<T>(emulator::reduce(emulator::Reduction::kMin, mask, value, place));
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, emulator::Place place = emulator::Place::here()) {
  return static_cast<T>(emulator::reduce(emulator::Reduction::kMax, mask, value, place));
}
inline void __syncwarp(unsigned mask = ~0u, emulator::Place place = emulator::Place::here()) {
  emulator::sync_warp(mask, place);
}
inline void __syncthreads(emulator::Place place = emulator::Place::here()) { emulator::sync_cta(place); }

// Memory and arithmetic.
template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value, emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_add(address, value, false, false, place);
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __log2f(float x) { return log2f(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline unsigned __byte_perm(unsigned first, unsigned second, unsigned selector) {
  const uint64_t bytes = uint64_t(second) << 32 | first;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (8 * (nibble & 7)) & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

#include "host_api.h"

#endif  // EMULATOR_CUDA_RUNTIME_H_
