// Choice of the instruction-set kernel at run time.
#ifndef MLA_CPU_DISPATCH_H_
#define MLA_CPU_DISPATCH_H_

#include "cpu/segment.h"

namespace mla {

// The fastest kernel that this machine runs for these dtypes (enum mla_dtype).
const Kernel& best_kernel(int q_dtype, int kv_dtype);

}  // namespace mla

#endif  // MLA_CPU_DISPATCH_H_
