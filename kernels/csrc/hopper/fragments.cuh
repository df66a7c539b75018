// Warp-level matrix instructions on register fragments, for the kernel of few query rows.
#ifndef MLA_HOPPER_FRAGMENTS_CUH_
#define MLA_HOPPER_FRAGMENTS_CUH_

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

// Four 8 x 8 matrices of 16-bit elements, each transposed; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t (&v)[2], uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t& v, uint32_t address) {
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(float& v, uint32_t address) {
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(v) : "r"(address) : "memory");
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_FRAGMENTS_CUH_
