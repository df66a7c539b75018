// mbarriers between a producer and the two teams of narrow.cuh, as far as load.cuh knows them.
#ifndef MLA_HOPPER_BARRIERS_CUH_
#define MLA_HOPPER_BARRIERS_CUH_

#include "params.cuh"
#include "ptx.cuh"

namespace mla_hopper {

template <typename L>
struct Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t query_full() const { return base; }
  __device__ __forceinline__ uint32_t query_empty() const { return query_full() + 8; }
  __device__ __forceinline__ uint32_t raw_full(uint32_t slot) const { return query_full() + 16 + 8 * slot; }
};

}  // namespace mla_hopper

#endif  // MLA_HOPPER_BARRIERS_CUH_
