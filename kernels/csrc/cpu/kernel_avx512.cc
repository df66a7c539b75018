#include "cpu/float_ops.h"

namespace mla {

const Kernel& avx512_kernel() {
  static const Kernel kernel = make_float_kernel("avx512", 40);
  return kernel;
}

}  // namespace mla
