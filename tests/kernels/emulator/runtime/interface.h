// What emulated device code calls: the hooks behind the CUDA headers of cuda/ and the PTX wrappers of device/.
#ifndef EMULATOR_INTERFACE_H_
#define EMULATOR_INTERFACE_H_

#include <stddef.h>
#include <stdint.h>

namespace emulator {

// A line of the kernels' source. As a default argument it is the caller's.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Index3 {
  unsigned x, y, z;
};
Index3 thread_index();
Index3 block_index();

// Warp collectives (collectives.cc). All 32 lanes must arrive at the same instruction.
enum class Shuffle { kIndex, kUp, kXor };
enum class Reduction { kAdd, kMin, kMax };
uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, Place place);
uint32_t ballot(uint32_t mask, bool predicate, Place place);
int64_t reduce(Reduction kind, uint32_t mask, int64_t value, Place place);
void sync_warp(uint32_t mask, Place place);
void set_registers(bool grow, int registers, Place place);

// Barriers (barriers.cc). Addresses are 32-bit shared ones.
void named_barrier(int barrier, int threads, bool wait, Place place);
void sync_cta(Place place);
void mbarrier_init(uint32_t barrier, uint32_t arrivals, Place place);
void mbarrier_init_fence(Place place);
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Place place);
void mbarrier_wait(uint32_t barrier, uint32_t parity, bool cluster_scope, Place place);
bool mbarrier_test(uint32_t barrier, uint32_t parity, Place place);

// Clusters (clusters.cc). Addresses of another CTA's shared memory are what cluster_address() made.
uint32_t cluster_rank();
void cluster_barrier(bool wait, Place place);
uint32_t cluster_address(uint32_t address, uint32_t rank, Place place);
void store_cluster(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier, Place place);

// Asynchronous copies to shared memory (copies.cc).
void tensor_copy(uint32_t destination, const void* map, uint32_t barrier, int x, int y, int z, Place place);
void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, Place place);
void fence_async_proxy(Place place);
void fence_async_proxy_global(Place place);

// Matrices (fragments.cc, wgmma.cc).
enum class Element { kBfloat16, kFloat16 };
void load_matrices(uint32_t (&fragment)[4], uint32_t address, bool transposed, Place place);
void store_matrices(uint32_t address, const uint32_t (&fragment)[4], Place place);
void multiply_fragments(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place);
// D[64, columns] (+)= A B. A is in shared memory (`a`) or, if not nullptr, in registers. B is K-major or MN-major.
struct WarpgroupProduct {
  Element element;
  int columns;
  float* accumulators;
  uint64_t a;
  const uint32_t* a_registers;
  uint64_t b;
  bool b_mn_major;
  bool accumulate;
};
void wgmma(const WarpgroupProduct& product, Place place);
void wgmma_fence(Place place);
void wgmma_commit(Place place);
void wgmma_wait(int pending, Place place);

// Memory (memory.cc).
uint32_t shared_address(const void* pointer, Place place);
void load_shared(void* destination, uint32_t address, uint32_t bytes, Place place);
void store_shared(uint32_t address, const void* source, uint32_t bytes, Place place);
uint32_t load_acquire(const uint32_t* address, Place place);
uint32_t atomic_add(uint32_t* address, uint32_t value, bool acquire, bool release, Place place);
void atomic_increment(uint32_t* address, uint32_t most, Place place);

// Runs body(context) as every thread of a grid (launch.cc). False, and error_text() says why, when it failed.
struct Launch {
  const void* function;
  unsigned ctas, threads, shared_bytes;
  unsigned cluster;  // CTAs of one
  bool cooperative;
  unsigned x, y;  // CTAs of the grid in these directions
};
bool run_grid(const Launch& launch, void (*body)(const void*), const void* context);
const char* error_text();
int multiprocessors();  // of the emulated device

}  // namespace emulator

#endif  // EMULATOR_INTERFACE_H_
