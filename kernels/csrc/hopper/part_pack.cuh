// Sums of weights times values in 16 bits, on their way to be merged: half the bytes, at an eighth of the error that
// rounding to bfloat16 makes later.
#ifndef MLA_HOPPER_PART_PACK_CUH_
#define MLA_HOPPER_PART_PACK_CUH_

#include <cuda_fp16.h>

#include "ptx.cuh"

namespace mla_hopper {

// Where the largest of a thread's values of a row lies between these, float16 takes all of them as they are: what it has
// no exponent for is off by 2^-17 of that largest at most. float16's bits.
constexpr uint32_t kLeastPacked = 0x1C00;  // 2^-8
constexpr uint32_t kMostPacked = 0x7BFF;   // 65504

// Two neighbouring chunks of 8 columns as accumulator fragments: a lane's 4 values of each, rows g, g, g + 8, g + 8.
__device__ __forceinline__ uint4 pack_chunks(const float* v, float low = 1.f, float high = 1.f) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float factor = i & 1 ? high : low;
    const __half2 pair = __floats2half2_rn(v[2 * i] * factor, v[2 * i + 1] * factor);
    word[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ __half2 unpacked(const uint32_t& word) { return reinterpret_cast<const __half2&>(word); }

// The largest magnitudes of a row's even and odd columns so far, and those of two words more. NaN counts as nothing.
__device__ __forceinline__ __half2 largest_magnitudes(const __half2& largest, const uint32_t& first, const uint32_t& second) {
  return __hmax2(__hmax2(largest, __habs2(unpacked(first))), __habs2(unpacked(second)));
}

__device__ __forceinline__ bool packs_well(const __half2& largest) {
  const uint32_t bits = reinterpret_cast<const uint32_t&>(largest);
  return max(bits & 0xFFFF, bits >> 16) - kLeastPacked <= kMostPacked - kLeastPacked;
}

// Hands a warp's accumulators, rows g and g + 8, to store(i, chunks 2 i and 2 i + 1): as they are, and as a rule that was
// it. Where a row's values are too large for float16 or too small, once more, times a power of two for each row. Returns the
// factors that undo it.
template <int kChunks, typename Store>
__device__ __forceinline__ float2 pack_rows(const float (&o)[4 * kChunks], const Store& store) {
  const uint32_t zeros = 0;
  __half2 low = unpacked(zeros), high = unpacked(zeros);
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) {
    const uint4 packed = pack_chunks(o + 8 * i);
    low = largest_magnitudes(low, packed.x, packed.z);
    high = largest_magnitudes(high, packed.y, packed.w);
    store(i, packed);
  }
  if (__all_sync(0xFFFFFFFFu, packs_well(low) && packs_well(high))) return make_float2(1.f, 1.f);

  float factor[2], inverse[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const float magnitude = fabsf(o[i / 2 * 4 + 2 * row + i % 2]);
      if (magnitude < INFINITY) largest = fmaxf(largest, magnitude);
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
    // To [2^14, 2^15), unless the factor's inverse would be subnormal.
    const uint32_t exponent = min(127 + 14 + 127 - (__float_as_uint(largest) >> 23), 253u);
    factor[row] = __uint_as_float(exponent << 23);
    inverse[row] = __uint_as_float((254 - exponent) << 23);
  }
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) store(i, pack_chunks(o + 8 * i, factor[0], factor[1]));
  return make_float2(inverse[0], inverse[1]);
}

// Adds values x, y of row g and z, w of row g + 8, times the rows' factors.
__device__ __forceinline__ void add_weighted(float4& sum, const float2& weight, const float4& value) {
  sum.x += weight.x * value.x;
  sum.y += weight.x * value.y;
  sum.z += weight.y * value.z;
  sum.w += weight.y * value.w;
}

// Adds packed chunks to their sum, times the weights of rows g and g + 8.
__device__ __forceinline__ void add_packed(float4& first, float4& second, const uint4& packed, float low, float high) {
  const uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float4& sum = i ? second : first;
    const float2 a = __half22float2(unpacked(word[2 * i]));
    const float2 b = __half22float2(unpacked(word[2 * i + 1]));
    add_weighted(sum, make_float2(low, high), make_float4(a.x, a.y, b.x, b.y));
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PART_PACK_CUH_
