// The warp-level matrix instruction on register fragments, for the kernel of few query rows.
#ifndef MLA_HOPPER_MMA_CUH_
#define MLA_HOPPER_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace mla_hopper {

// D[16, 8] += A[16, 16] B[16, 8] of one warp, float32 accumulation. Lane 4 g + c holds of A rows g and g + 8, k 2 c, 2 c + 1
// and these plus 8; of B column g, the same k; of D rows g and g + 8, columns 2 c and 2 c + 1.
#define MLA_MMA(TYPE, KIND)                                                                                             \
  __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TYPE) {           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};\n"                                                                                            \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                 \
  }
MLA_MMA(__nv_bfloat16, "bf16")
MLA_MMA(__half, "f16")
#undef MLA_MMA

}  // namespace mla_hopper

#endif  // MLA_HOPPER_MMA_CUH_
