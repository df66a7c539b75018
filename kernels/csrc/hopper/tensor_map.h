// Tensor maps for the copy engine.
#ifndef MLA_HOPPER_TENSOR_MAP_H_
#define MLA_HOPPER_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "arguments.h"
#include "params.cuh"

namespace mla_hopper {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that the library links against no driver.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      pointer = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(pointer);
  }();
  return function;
}

// A map of a [z, y, 512 + 64] tensor of 16-bit elements whose boxes are [1, rows, 64], swizzled as wgmma reads them.
// Strides count elements; y past its size reads as zeros.
inline int32_t make_map(CUtensorMap* map, const char* name, int32_t dtype, const void* data, int y, int64_t y_stride, int z,
                 int64_t z_stride, int rows, const Failure& fail) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) {
    return fail(MLA_ERROR_RUNTIME, "the CUDA driver has no cuTensorMapEncodeTiled; it is older than 12.0");
  }
  const CUtensorMapDataType type =
      dtype == MLA_DTYPE_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // A dimension of size 1 may come with any stride, and an empty pool is never read: keep the map valid.
  const cuuint64_t size[3] = {kDim, static_cast<cuuint64_t>(y), static_cast<cuuint64_t>(std::max(z, 1))};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(y > 1 ? y_stride * 2 : kDim * 2),
                                static_cast<cuuint64_t>(z > 1 ? z_stride * 2 : kDim * 2)};
  const cuuint32_t box[3] = {kColumns, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t step[3] = {1, 1, 1};
  const CUresult result =
      encode(map, type, 3, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return fail(MLA_ERROR_INVALID_ARGUMENT,
                "%s=%p of shape [%d, %d, %d] with strides %lld and %lld: the driver refuses a tensor map (CUresult %d)",
                name, data, z, y, kDim, static_cast<long long>(z_stride), static_cast<long long>(y_stride),
                static_cast<int>(result));
  }
  return MLA_OK;
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_TENSOR_MAP_H_
