// e4m3 codes to bfloat16 by bit moves.
#ifndef MLA_HOPPER_CODES_CUH_
#define MLA_HOPPER_CODES_CUH_

#include <stdint.h>

#include "ptx.cuh"

namespace mla_hopper {

// Two codes as bfloat16 times 2^-120: the exponent field moves unchanged, so that e4m3's subnormals become bfloat16's and
// all values are exact. `spread` holds each code sign-extended to 16 bits, as byte_pair() gives it. A NaN code (0x7F)
// reads as 480.
__device__ __forceinline__ uint32_t shifted_codes(uint32_t spread) { return (spread << 4) & 0x87F087F0u; }

// Bytes kLow and kHigh of the eight in `first` (0 to 3) and `second` (4 to 7), each sign-extended to 16 bits.
template <int kLow, int kHigh>
__device__ __forceinline__ uint32_t byte_pair(uint32_t first, uint32_t second) {
  return permute_bytes<kLow | (8 | kLow) << 4 | kHigh << 8 | (8 | kHigh) << 12>(first, second);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_CODES_CUH_
