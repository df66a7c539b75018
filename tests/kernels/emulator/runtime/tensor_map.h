// What cuTensorMapEncodeTiled leaves and the copy engine reads.
#ifndef EMULATOR_TENSOR_MAP_H_
#define EMULATOR_TENSOR_MAP_H_

#include <stdint.h>

namespace emulator {

// Three dimensions of 16-bit elements, the first contiguous; strides count bytes.
struct alignas(64) TensorMap {
  uint64_t base;
  uint64_t size[3];
  uint64_t stride[2];
  uint32_t box[3];
  uint32_t valid;  // 1 once encoded
};

// False where the driver would refuse (driver API, cuTensorMapEncodeTiled: 128-byte swizzle, no interleave).
bool encode_tensor_map(TensorMap& map, uint32_t rank, const void* base, const uint64_t* size, const uint64_t* stride,
                       const uint32_t* box, const uint32_t* step);

}  // namespace emulator

#endif  // EMULATOR_TENSOR_MAP_H_
