// The state of an emulated launch. One operating system thread runs everything: CUDA threads are fibers, and a seed
// decides which of those that can go on does, and when asynchronous work is done.
#ifndef EMULATOR_MACHINE_H_
#define EMULATOR_MACHINE_H_

#include <stdint.h>

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "fiber.h"
#include "interface.h"
#include "tensor_map.h"

namespace emulator {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr uint32_t kMostShared = 232448;  // bytes a CTA can ask for
constexpr size_t kSharedStride = (kMostShared + 4095) / 4096 * 4096;
constexpr int kRegisterFile = 65536;
constexpr int kCopyAgents = 64;  // copies that a CTA may have in flight

struct Cta;
struct Warp;

struct Thread {
  Fiber fiber;
  Cta* cta;
  Warp* warp;
  int index;  // in the CTA
  bool returned = false;
  const char* doing = "begins";  // last emulated operation, and where
  Place place = {"", 0};
  uint32_t operand[2] = {0, 0};      // of a wait, for reports
  const uint32_t* polled = nullptr;  // load_acquire that would read the same again
  uint32_t polled_value = 0;
  std::vector<uint32_t> unfenced;  // shared words written since its last proxy fence
  Clock clock;
  Clock announced;  // what it knew at its last proxy fence for global memory
  uint64_t acquired = 0;  // how often it has learned from others
  int lane() const { return index & 31; }
};

// Accumulators of one warp that products in flight are adding to: 16 rows of `columns`.
struct Accumulators {
  float* registers[32];
  int columns;
  std::vector<float> value;
};

struct PendingProduct {
  WarpgroupProduct product;
  const uint32_t* a_registers[32];
  std::shared_ptr<Accumulators> target;
  uint64_t group;
  uint32_t epoch;
  std::shared_ptr<const Clock> clock;  // what the warp knew when it was issued
  bool executed;
  Place place;
};

struct Warp {
  Cta* cta;
  int index;
  Thread* threads[32];
  uint32_t ready = 0;  // lanes that can go on
  // The collective that lanes are gathering for.
  uint32_t arrived = 0;
  const char* collective = nullptr;
  Place collective_place = {"", 0};
  void* arguments[32];
  uint32_t gatherings = 1;
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  // Warpgroup instructions.
  int registers;  // of a thread
  int register_changes = 0;
  uint64_t products_issued = 0, open_group = 0;
  bool fenced = false;
  uint32_t product_epoch = 0;
  std::shared_ptr<const Clock> known;  // what its lanes know together,
  uint64_t known_as_of = 0;            // and when that was (wgmma.cc)
  std::deque<PendingProduct> products;
};

struct MBarrier {
  uint32_t arrivals, pending;
  int64_t bytes = 0;    // expected and not yet there
  int64_t unasked = 0;  // expected, and no copy asked for them yet
  uint32_t phase = 0;
  Access initialised = {};
  bool announced = false;             // to the async proxy and, with the phase of barrier.cluster that its thread
  unsigned announced_in = 0;          // arrives for next, to the cluster
  bool remote = false;                // others of the cluster have arrived or stored
  Clock arriving = {}, arrived = {};  // what those knew who arrived in this phase; in completed ones
  std::vector<Thread*> waiting = {};
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  Clock clock = {};
  std::vector<Warp*> waiting;
};

struct Copy {
  Cta* cta;  // into whose memory
  uint32_t destination, bytes, barrier;
  char stored[16];     // what another CTA's thread stores, if
  bool remote;         // it is that;
  const char* source;  // else of bytes in a row, or nullptr and
  TensorMap map;       // where a box begins
  int at[3];
  uint16_t agent;
  uint32_t epoch;
  std::shared_ptr<const Clock> clock;  // what the thread knew that asked for it; nullptr when that is not passed on
  const Cta* asker;
  int thread;
  Place place;
};

// Last accesses to 16 bytes of shared memory.
struct Unit {
  struct Read {
    Access access;
    uint32_t gathering;  // of a thread: how often its warp had gathered
    uint8_t words;       // bit i: word i
  };
  Access writes[4];
  std::vector<Read> reads;
};

// barrier.cluster with relaxed arrivals, which order nothing but mbarrier_init_fence() before them.
struct ClusterBarrier {
  unsigned phase = 0;
  std::vector<Warp*> waiting;
};

struct Cta {
  unsigned index;
  ClusterBarrier* cluster;
  char* shared;  // its memory, wherever it is mapped besides
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
  std::vector<Warp*> ready;
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<uint16_t> unfenced;  // for each word: 1 + thread that wrote it and ran no proxy fence since
  std::vector<Unit> units;
  std::vector<uint16_t> free_copy_agents;
  Epochs copy_epochs;
  int free_registers;
  int live;
};

// Lanes of a warp that wait for something nobody announces.
struct Watcher {
  Warp* warp;
  uint32_t lanes;
  std::function<bool()> ready;
};

// A tensor that the kernel may touch.
struct Region {
  std::string name;
  uintptr_t begin, bytes;
  bool writable;
};

struct Options {
  uint64_t seed = 0;
  int multiprocessors = 8;
  std::vector<Region> regions;
};

// Who asked for the asynchronous work that is being done.
struct Blame {
  const Cta* cta;
  int thread;
  const char* doing;
  Place place;
};

struct Machine {
  Options options;
  Launch launch;
  uintptr_t host_stack;  // where the launching function's variables begin
  std::string kernel;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<ClusterBarrier>> clusters;
  std::vector<unsigned> unstarted;  // clusters of a launch that is not cooperative
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Copy> copies;
  std::vector<Watcher> watchers;
  Thread* current = nullptr;
  const Blame* blame = nullptr;
  Cta* mapped = nullptr;   // whose shared memory is where kernels' pointers point;
  char* window = nullptr;  // that is here, and as 32-bit addresses from
  uint32_t shared_base;    // on: aligned to 16 bytes, or to what its declaration asks for
  Fiber scheduler;
  int live = 0;
  bool failed = false;
  std::string error;
  // How this seed behaves: one in so many steps.
  unsigned copy_rate, product_rate, switch_rate, yield_rate;

  bool one_in(unsigned n) { return n != 0 && random() % n == 0; }
};
extern Machine machine;

// scheduler.cc
void park();  // the current thread until somebody readies it
void make_ready(Warp& warp, uint32_t lanes);
void wait_until(Warp& warp, uint32_t lanes, std::function<bool()> ready);  // readies them; then park()
void run_until_done();

// Notes what the current thread does, gives others a chance, and returns it.
Thread& enter(const char* doing, Place place);

// faults.cc: whether the synchronisation at this place is to be left out, or its parity inverted.
bool dropped(const char* operation, Place place);
bool inverted(Place place);
const char* file_name(Place place);  // without folders

// Ends the launch with this text, after kernel, CTA, warp, lane and place of the current thread or blame.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// collectives.cc: gathers the warp; the last lane runs `action`, which says whether the lanes may go on at once.
void collective(const char* name, Place place, void* argument, bool (*action)(Warp& warp, void* const* arguments));

// copies.cc, wgmma.cc, barriers.cc: what the scheduler asks for.
void execute_copy(size_t index);
void execute_product(Warp& warp);
bool products_waiting(const Warp& warp);
void ask_for_copy(const Thread& thread, Cta& cta, uint32_t barrier, uint32_t bytes);
void complete_copy(const Copy& copy);

// barriers.cc: the mbarrier at a shared address, checked, and an arrival there by a thread of any CTA of the cluster.
MBarrier& mbarrier_of(const Thread& thread, Cta& cta, uint32_t address);
void arrive_at(Thread& thread, const Cta& cta, MBarrier& barrier);

// clusters.cc
void thread_left_cluster(Thread& thread);

// memory.cc
void map_shared(Cta& cta);
char* shared_memory_of(unsigned cta);
void* shared_at(Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment);  // checked
void touched_by_async_proxy(Cta& cta, uint32_t address, uint32_t bytes);  // checked
void wrote_shared(Thread& thread, uint32_t address, uint32_t bytes);
void plain_access(const void* pointer, uint32_t bytes, bool write);
const Region& check_global(const void* pointer, uint64_t bytes, uint32_t alignment, bool write);

}  // namespace emulator

#endif  // EMULATOR_MACHINE_H_
