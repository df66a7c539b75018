// Vectors of W floats on whatever instruction set the including translation unit is compiled for, by GCC's and
// Clang's vector extensions. Everything has internal linkage: two units compiled for different instruction sets must
// never share an inline function, or the linker could hand the AVX-512 copy to a machine without it.
#ifndef MLA_CPU_VEC_H_
#define MLA_CPU_VEC_H_

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "mla_decode.h"

namespace mla {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

#define MLA_INLINE inline __attribute__((always_inline))

MLA_INLINE vf splat(float x) { return x - vf{}; }

template <class V>
MLA_INLINE V load_as(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
MLA_INLINE void store_as(void* to, V v) { memcpy(to, &v, sizeof v); }

MLA_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float value;
  uint32_t bits;
  if (exponent == 0) {
    value = (float)fraction * 0x1p-24f;  // zero or subnormal
    memcpy(&bits, &value, 4);
  } else {
    bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: add a float whose last place is 2^-24
    float value;
    memcpy(&value, &bits, 4);
    value += 0.5f;
    memcpy(&bits, &value, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

// W values of a tensor of dtype D (enum mla_dtype) as floats.
template <int D>
MLA_INLINE vf load(const void* from) {
  if constexpr (D == MLA_DTYPE_FLOAT32) {
    return load_as<vf>(from);
  } else if constexpr (D == MLA_DTYPE_BFLOAT16) {
    return (vf)(__builtin_convertvector(load_as<vh>(from), vu) << 16);
  } else {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
    const vh h = load_as<vh>(from);
    vf v;
    for (int i = 0; i < W; ++i) v[i] = half_to_float(h[i]);
    return v;
#endif
  }
}

template <int D>
MLA_INLINE void store(void* to, vf v) {
  if constexpr (D == MLA_DTYPE_FLOAT32) {
    store_as(to, v);
  } else if constexpr (D == MLA_DTYPE_BFLOAT16) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_as(to, __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, vh));
  } else {
#if defined(__AVX512F__)
    store_as(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    store_as(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    vh h;
    for (int i = 0; i < W; ++i) h[i] = float_to_half(v[i]);
    store_as(to, h);
#endif
  }
}

// W e4m3 values as floats: exponent and fraction move to a float's place, where they mean 2^-120 of the value
// (subnormals too); 0x7f is NaN.
MLA_INLINE vf load_e4m3(const void* from) {
  const vu code = __builtin_convertvector(load_as<vb>(from), vu);
  const vf magnitude = (vf)((code & 0x7f) << 20) * 0x1p120f;
  const vf value = (vf)((vu)magnitude | (code & 0x80) << 24);
  return (code & 0x7f) == 0x7f ? splat(NAN) : value;
}

// Bytes of the unit that strides count.
MLA_INLINE int dtype_bytes(int dtype) {
  return dtype == MLA_DTYPE_FLOAT32 ? 4 : dtype == MLA_DTYPE_FP8_DS_MLA ? 1 : 2;
}

// 2^x for x <= 0, relative error below 2e-7; below 2^-126 it is 0; NaN stays NaN. Minimax polynomial of 2^f on
// [-1/2, 1/2], f = x - round(x).
MLA_INLINE vf exp2_nonpositive(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf clamped = x < -126.0f ? splat(-126.0f) : x;
  const vf shifted = clamped + magic;
  const vf f = clamped - (shifted - magic);
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const vf power = (vf)((((vu)shifted - 0x4b400000u) + 127u) << 23);
  const vf y = p * power;
  return x < -126.0f ? splat(0.0f) : y;
}

MLA_INLINE float exp2_scalar(float x) { return exp2_nonpositive(splat(x))[0]; }

MLA_INLINE float sum_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = v[0];
  for (int i = 1; i < W; ++i) sum += v[i];
  return sum;
#endif
}

MLA_INLINE float max_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

}  // namespace
}  // namespace mla

#endif  // MLA_CPU_VEC_H_
