#include "cpu/float_ops.h"

namespace mla {

const Kernel& avx2_kernel() {
  static const Kernel kernel = make_float_kernel("avx2", 20);
  return kernel;
}

}  // namespace mla
