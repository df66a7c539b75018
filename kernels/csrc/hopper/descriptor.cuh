// Where wgmma finds a matrix in shared memory.
#ifndef MLA_HOPPER_DESCRIPTOR_CUH_
#define MLA_HOPPER_DESCRIPTOR_CUH_

#include <stdint.h>

namespace mla_hopper {

// A 128-byte-swizzled shared-memory matrix. `leading` and `stride` are byte offsets: for a K-major operand `stride` is
// between groups of 8 rows and `leading` is unused; for an MN-major operand `leading` is between 64-element columns and
// `stride` between groups of 8 rows of K.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return (uint64_t(1) << 62) | (uint64_t(stride >> 4) << 32) | (uint64_t(leading >> 4) << 16) |
         uint64_t((address & 0x3FFFF) >> 4);
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_DESCRIPTOR_CUH_
