// Kernels that each do one thing wrong, to see the emulator say so (test_hopper_emulated.py).
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#include "mma.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace mla_hopper {

constexpr int kThreads = 384;
constexpr int kShared = 64 * 1024;

struct Probe {
  uint32_t* data;   // 64 words that the kernel may write, of 0
  const char* bytes;  // 16 KB that it may read
};

struct Cta {
  char* pointer;
  uint32_t address;
  int lane, warp;
};

__device__ Cta begin() {
  extern __shared__ char dynamic_smem[];
  const uint32_t address = (shared_address(dynamic_smem) + 1023) & ~1023u;
  return {dynamic_smem + (address - shared_address(dynamic_smem)), address, int(threadIdx.x % 32), int(threadIdx.x / 32)};
}

// An mbarrier for `arrivals`, behind the first 16 KB.
__device__ uint32_t barrier_for(const Cta& cta, uint32_t arrivals) {
  const uint32_t barrier = cta.address + 16384;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, arrivals);
    mbarrier_init_fence();
  }
  __syncthreads();
  return barrier;
}

__global__ void parting_lanes(Probe) {
  const Cta cta = begin();
  if (cta.lane < 16) {
    __syncwarp();
  } else {
    __shfl_sync(~0u, 1, 0);
  }
}
__global__ void missing_lane(Probe) {
  if (begin().lane != 3) __syncwarp();
}
__global__ void named_barrier_of_two_sizes(Probe) {
  const Cta cta = begin();
  named_sync(1, cta.warp == 0 ? 384 : 128);
}
__global__ void named_barrier_left(Probe) {
  if (begin().warp == 0) named_arrive(1, 64);
}
__global__ void barrier_never_initialised(Probe) { mbarrier_arrive(begin().address); }
__global__ void barrier_not_yet_seen(Probe) {
  const uint32_t barrier = begin().address;
  if (threadIdx.x == 0) mbarrier_init(barrier, kThreads);
  if (threadIdx.x < 32) __shfl_sync(~0u, 1, 0);
  if (threadIdx.x < 32) mbarrier_arrive(barrier);
}
__global__ void one_arrival_too_many(Probe) {
  const uint32_t barrier = barrier_for(begin(), 1);
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 16);
    mbarrier_arrive(barrier);
  }
}
__global__ void barrier_without_fence(Probe probe) {
  const Cta cta = begin();
  const uint32_t barrier = cta.address + 16384;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_expect(barrier, 16);
    bulk_copy(cta.address, probe.bytes, 16, barrier, 0);
  }
}
__global__ void more_bytes_than_expected(Probe probe) {
  const Cta cta = begin();
  const uint32_t barrier = barrier_for(cta, 1);
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 16);
    bulk_copy(cta.address, probe.bytes, 32, barrier, 0);
  }
}
__global__ void fewer_bytes_than_expected(Probe probe) {
  const Cta cta = begin();
  const uint32_t barrier = barrier_for(cta, 1);
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 32);
    bulk_copy(cta.address, probe.bytes, 16, barrier, 0);
  }
  mbarrier_wait(barrier, 0);
}
__global__ void copy_outlives_its_cta(Probe probe) {
  const Cta cta = begin();
  const uint32_t barrier = barrier_for(cta, 1);
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 48);
    bulk_copy(cta.address, probe.bytes, 16, barrier, 0);
    bulk_copy(cta.address + 16, probe.bytes, 16, barrier, 0);
    bulk_copy(cta.address + 32, probe.bytes, 16, barrier, 0);
  }
}
__global__ void two_copies_to_one_place(Probe probe) {
  const Cta cta = begin();
  const uint32_t barrier = barrier_for(cta, 1);
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 64);
    bulk_copy(cta.address, probe.bytes, 32, barrier, 0);
    bulk_copy(cta.address + 16, probe.bytes, 32, barrier, 0);
  }
}
__global__ void copy_from_past_the_end(Probe probe) {
  const Cta cta = begin();
  const uint32_t barrier = barrier_for(cta, 1);
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, 32);
    bulk_copy(cta.address, probe.bytes + 16384 - 16, 32, barrier, 0);
  }
}
__global__ void misaligned_word(Probe) { load_shared<uint32_t>(begin().address + 2); }
__global__ void misaligned_vector(Probe) {
  *reinterpret_cast<uint4*>(begin().pointer + 16 * threadIdx.x + 8) = make_uint4(1, 2, 3, 4);
}
__global__ void past_shared_memory(Probe) { store_shared(begin().address + kShared, 1); }
__global__ void past_shared_memory_by_pointer(Probe) { begin().pointer[kShared] = 1; }
__global__ void past_a_tensor(Probe probe) {
  begin();
  if (threadIdx.x == 7) probe.data[64] = 1;
}
__global__ void write_to_an_input(Probe probe) {
  begin();
  if (threadIdx.x == 7) const_cast<char*>(probe.bytes)[3] = 1;
}
__global__ void two_writers(Probe) {
  const Cta cta = begin();
  if (cta.lane == 0) reinterpret_cast<uint32_t*>(cta.pointer)[0] = cta.warp;
}
__global__ void two_writers_to_a_tensor(Probe probe) {
  begin();
  if (threadIdx.x == 7) probe.data[5] = 1 + blockIdx.x;
}
__global__ void registers_that_nobody_gives_back(Probe) {
  begin();
  grow_registers<176>();
}
__global__ void growing_to_fewer(Probe) {
  begin();
  grow_registers<64>();
}
__global__ void warpgroup_in_parts(Probe) {
  if (begin().warp != 2) shrink_registers<64>();
}
__global__ void past_the_cluster(Probe) { cluster_address(begin().address, 2); }
__global__ void cluster_barrier_twice(Probe) {
  begin();
  cluster_arrive();
  cluster_arrive();
}
__global__ void cluster_barrier_not_arrived_at(Probe) {
  begin();
  cluster_wait();
}

// CTA 1 sends CTA 0 1 KB, for which that waits.
struct Mistakes {
  bool early = false, twice = false, unread = false, cta_scope = false, leaves = false, other_barrier = false;
};
__device__ void send(Mistakes mistakes) {
  const Cta cta = begin();
  const uint32_t barrier = cta.address + 16384;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, mistakes.twice ? 2048 : 1024);
  }
  if (!mistakes.early) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x < (mistakes.twice ? 2u : 1u) && cluster_rank() == 1) {
    const uint32_t sent = cluster_address(barrier, mistakes.other_barrier ? 1 : 0);
    const uint32_t there = cluster_address(cta.address, 0);
    for (int i = 0; i < 64; ++i) store_cluster(there + 16 * i, make_float4(1, 2, 3, 4), sent);
  }
  if (cluster_rank() == 0 && !mistakes.leaves) {
    if (mistakes.cta_scope) {
      mbarrier_wait(barrier, 0);
    } else if (!mistakes.unread) {
      mbarrier_wait_cluster(barrier, 0);
    }
    uint32_t vector[4];
    load_shared(vector, cta.address);
  }
}
__global__ void sending(Probe) { send({}); }
__global__ void sent_before_the_barrier_is_there(Probe) { send({.early = true}); }
__global__ void sent_twice(Probe) { send({.twice = true}); }
__global__ void read_before_it_is_sent(Probe) { send({.unread = true}); }
__global__ void waited_for_in_the_cta(Probe) { send({.cta_scope = true}); }
__global__ void receiver_has_left(Probe) { send({.leaves = true}); }
__global__ void sent_with_another_barrier(Probe) { send({.other_barrier = true}); }

template <bool kFence, bool kProxyFence, bool kWait>
__global__ void product(Probe probe) {
  const Cta cta = begin();
  if (threadIdx.x < 128) {
    for (int i = threadIdx.x; i < 4096; i += 128) reinterpret_cast<uint32_t*>(cta.pointer)[i] = 0;
    if (kProxyFence) fence_async_proxy();
    named_sync(1, 128);
    float d[32];
    if (kFence) wgmma_fence();
    Wgmma<__half>::scores(d, matrix_descriptor(cta.address, 16, 1024), matrix_descriptor(cta.address + 8192, 16, 1024), 0);
    wgmma_commit();
    if (!kWait) d[0] += 1.f;
    wgmma_wait<0>();
    if (threadIdx.x == 0 && blockIdx.x == 0) probe.data[0] = d[0] == 0.f;
  }
}

namespace {

struct Entry {
  const char* name;
  void (*kernel)(Probe);
};
#define ENTRY(name) {#name, name}
const Entry kProbes[] = {
    ENTRY(parting_lanes),
    ENTRY(missing_lane),
    ENTRY(named_barrier_of_two_sizes),
    ENTRY(named_barrier_left),
    ENTRY(barrier_never_initialised),
    ENTRY(barrier_not_yet_seen),
    ENTRY(one_arrival_too_many),
    ENTRY(barrier_without_fence),
    ENTRY(more_bytes_than_expected),
    ENTRY(fewer_bytes_than_expected),
    ENTRY(copy_outlives_its_cta),
    ENTRY(two_copies_to_one_place),
    ENTRY(copy_from_past_the_end),
    ENTRY(misaligned_word),
    ENTRY(misaligned_vector),
    ENTRY(past_shared_memory),
    ENTRY(past_shared_memory_by_pointer),
    ENTRY(past_a_tensor),
    ENTRY(write_to_an_input),
    ENTRY(two_writers),
    ENTRY(two_writers_to_a_tensor),
    ENTRY(registers_that_nobody_gives_back),
    ENTRY(growing_to_fewer),
    ENTRY(warpgroup_in_parts),
    ENTRY(past_the_cluster),
    ENTRY(cluster_barrier_twice),
    ENTRY(cluster_barrier_not_arrived_at),
    ENTRY(sending),
    ENTRY(sent_before_the_barrier_is_there),
    ENTRY(sent_twice),
    ENTRY(read_before_it_is_sent),
    ENTRY(waited_for_in_the_cta),
    ENTRY(receiver_has_left),
    ENTRY(sent_with_another_barrier),
    {"product", product<true, true, true>},
    {"product_without_fence", product<false, true, true>},
    {"product_without_proxy_fence", product<true, false, true>},
    {"product_touched_before_its_wait", product<true, true, false>},
};

}  // namespace
}  // namespace mla_hopper

// Runs the probe of this name on a cluster of two CTAs; what went wrong, or nothing.
extern "C" const char* probe(const char* name, uint32_t* data, const char* bytes) {
  for (const auto& entry : mla_hopper::kProbes) {
    if (strcmp(entry.name, name) != 0) continue;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2);
    config.blockDim = dim3(mla_hopper::kThreads);
    config.dynamicSmemBytes = mla_hopper::kShared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, entry.kernel, mla_hopper::Probe{data, bytes});
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  }
  return "no such probe";
}
