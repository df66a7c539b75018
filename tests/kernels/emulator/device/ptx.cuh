// Stands for kernels/csrc/hopper/ptx.cuh: the same functions, carried out by the emulator. A place says who called.
#ifndef MLA_HOPPER_PTX_CUH_
#define MLA_HOPPER_PTX_CUH_

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace mla_hopper {

using emulator::Place;

inline uint32_t shared_address(const void* pointer, Place place = Place::here()) {
  return emulator::shared_address(pointer, place);
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals, Place place = Place::here()) {
  emulator::mbarrier_init(barrier, arrivals, place);
}
inline void mbarrier_init_fence(Place place = Place::here()) { emulator::mbarrier_init_fence(place); }
inline void mbarrier_arrive(uint32_t barrier, Place place = Place::here()) {
  emulator::mbarrier_arrive(barrier, 0, place);
}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes, Place place = Place::here()) {
  emulator::mbarrier_arrive(barrier, bytes, place);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, Place place = Place::here()) {
  emulator::mbarrier_wait(barrier, parity, false, place);
}
inline bool mbarrier_test(uint32_t barrier, uint32_t parity, Place place = Place::here()) {
  return emulator::mbarrier_test(barrier, parity, place);
}

inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void prefetch_line(const void*) {}

inline void tensor_copy(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x, int y, int z, uint64_t,
                        Place place = Place::here()) {
  emulator::tensor_copy(destination, map, barrier, x, y, z, place);
}
inline void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, uint64_t,
                      Place place = Place::here()) {
  emulator::bulk_copy(destination, source, bytes, barrier, place);
}

inline void load_fragment(uint32_t (&fragment)[4], uint32_t address, Place place = Place::here()) {
  emulator::load_matrices(fragment, address, false, place);
}
inline void load_transposed(uint32_t (&fragment)[4], uint32_t address, Place place = Place::here()) {
  emulator::load_matrices(fragment, address, true, place);
}
inline void store_fragment(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d, Place place = Place::here()) {
  const uint32_t fragment[4] = {a, b, c, d};
  emulator::store_matrices(address, fragment, place);
}

inline void fence_async_proxy(Place place = Place::here()) { emulator::fence_async_proxy(place); }

inline void fence_async_proxy_global(Place place = Place::here()) { emulator::fence_async_proxy_global(place); }

inline void named_sync(int barrier, int threads, Place place = Place::here()) {
  emulator::named_barrier(barrier, threads, true, place);
}
inline void named_arrive(int barrier, int threads, Place place = Place::here()) {
  emulator::named_barrier(barrier, threads, false, place);
}

inline uint32_t load_acquire(const uint32_t* address, Place place = Place::here()) {
  return emulator::load_acquire(address, place);
}
inline void add_release(uint32_t* address, uint32_t value, Place place = Place::here()) {
  emulator::atomic_add(address, value, false, true, place);
}
inline void add_cyclic(uint32_t* address, uint32_t most, Place place = Place::here()) {
  emulator::atomic_increment(address, most, place);
}
inline uint32_t add_ordered(uint32_t* address, Place place = Place::here()) {
  return emulator::atomic_add(address, 1, true, true, place);
}

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive(Place place = Place::here()) { emulator::cluster_barrier(false, place); }
inline void cluster_wait(Place place = Place::here()) { emulator::cluster_barrier(true, place); }
inline uint32_t cluster_address(uint32_t address, uint32_t rank, Place place = Place::here()) {
  return emulator::cluster_address(address, rank, place);
}
template <typename T>
void store_cluster(uint32_t address, const T& value, uint32_t barrier, Place place = Place::here()) {
  emulator::store_cluster(address, &value, sizeof(T), barrier, place);
}
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity, Place place = Place::here()) {
  emulator::mbarrier_wait(barrier, parity, true, place);
}

inline int lane_index() { return threadIdx.x % 32; }
inline int thread_index() { return threadIdx.x; }

template <typename T>
T load_shared(uint32_t address, Place place = Place::here()) {
  T value;
  emulator::load_shared(&value, address, sizeof(T), place);
  return value;
}
template <int kCount>
void load_shared(uint32_t (&v)[kCount], uint32_t address, Place place = Place::here()) {
  emulator::load_shared(v, address, 4 * kCount, place);
}
inline float2 load_shared2(uint32_t address, Place place = Place::here()) {
  float2 value;
  emulator::load_shared(&value, address, sizeof value, place);
  return value;
}
inline void store_shared(uint32_t address, uint32_t value, Place place = Place::here()) {
  emulator::store_shared(address, &value, 4, place);
}
inline void store_shared(uint32_t address, const uint32_t (&v)[4], Place place = Place::here()) {
  emulator::store_shared(address, v, 16, place);
}
inline void store_zeros(uint32_t address, Place place = Place::here()) { store_shared(address, {0, 0, 0, 0}, place); }

template <uint32_t kSelector>
uint32_t permute_bytes(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, kSelector);
}

template <int kRegisters>
void grow_registers(Place place = Place::here()) {
  emulator::set_registers(true, kRegisters, place);
}
template <int kRegisters>
void shrink_registers(Place place = Place::here()) {
  emulator::set_registers(false, kRegisters, place);
}

// Not correctly rounded on a GPU either.
inline float reciprocal_approximate(float x) { return nextafterf(1.f / x, 0.f); }

// ex2.approx.ftz: subnormal results become 0.
inline float exp2_approximate(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_PTX_CUH_
