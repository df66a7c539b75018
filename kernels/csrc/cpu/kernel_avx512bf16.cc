#include "cpu/float_ops.h"

namespace mla {

const Kernel& avx512bf16_kernel() {
  static const Kernel kernel = make_float_kernel("avx512bf16");
  return kernel;
}

}  // namespace mla
