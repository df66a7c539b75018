// e4m3 codes to bfloat16 by bit moves, and the tensor instruction that takes them from registers.
#ifndef MLA_HOPPER_CODES_CUH_
#define MLA_HOPPER_CODES_CUH_

#include <stdint.h>

namespace mla_hopper {

// Two codes as bfloat16 times 2^-120: the exponent field moves unchanged, so that e4m3's subnormals become bfloat16's and
// all values are exact. `spread` holds each code sign-extended to 16 bits, as byte_pair() gives it. A NaN code (0x7F)
// reads as 480.
__device__ __forceinline__ uint32_t shifted_codes(uint32_t spread) { return (spread << 4) & 0x87F087F0u; }

// Bytes kLow and kHigh of the eight in `first` (0 to 3) and `second` (4 to 7), each sign-extended to 16 bits.
template <int kLow, int kHigh>
__device__ __forceinline__ uint32_t byte_pair(uint32_t first, uint32_t second) {
  uint32_t pair;
  asm("prmt.b32 %0, %1, %2, %3;\n"
      : "=r"(pair)
      : "r"(first), "r"(second), "n"(kLow | (8 | kLow) << 4 | kHigh << 8 | (8 | kHigh) << 12));
  return pair;
}

// D[16, 8] += A[16, 16] B[16, 8] of one warp, bfloat16 with float32 accumulation. Lane 4 g + c holds of A rows g and
// g + 8, k 2 c, 2 c + 1 and these plus 8; of B column g, the same k; of D rows g and g + 8, columns 2 c and 2 c + 1.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_CODES_CUH_
