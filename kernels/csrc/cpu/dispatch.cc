#include "cpu/dispatch.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "mla_decode.h"

namespace mla {

const Kernel& portable_kernel();
#if defined(__x86_64__)
const Kernel& avx2_kernel();
const Kernel& avx512_kernel();
const Kernel& avx512bf16_kernel();
#endif

namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows "f16c".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

// MLA_CPU_ISA (portable, avx2, avx512, avx512bf16) caps the choice, for tests and for comparing code paths.
int level() {
  __builtin_cpu_init();
  int best = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = 2;
  if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = 3;
  const char* names[] = {"portable", "avx2", "avx512", "avx512bf16"};
  const char* wanted = getenv("MLA_CPU_ISA");
  for (int i = 0; wanted != nullptr && i < best; ++i)
    if (strcmp(wanted, names[i]) == 0) return i;
  return best;
}
#endif

}  // namespace

const Kernel& best_kernel(int q_dtype, int kv_dtype) {
#if defined(__x86_64__)
  static const int best = level();
  // A wider query or cache would lose bits in the bfloat16 dot product; unpacked e4m3 loses no more than it has lost.
  const bool coarse_cache = kv_dtype == MLA_DTYPE_BFLOAT16 || kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  if (best >= 3 && q_dtype == MLA_DTYPE_BFLOAT16 && coarse_cache) return avx512bf16_kernel();
  if (best >= 2) return avx512_kernel();
  if (best >= 1) return avx2_kernel();
#else
  (void)q_dtype;
  (void)kv_dtype;
#endif
  return portable_kernel();
}

}  // namespace mla
