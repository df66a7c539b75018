#include "cpu/float_ops.h"

namespace mla {

const Kernel& portable_kernel() {
  static const Kernel kernel = make_float_kernel("portable", 4);
  return kernel;
}

}  // namespace mla
