// A launch: if it is cooperative every CTA of the grid is resident, else some clusters begin when others have ended.
#include <cxxabi.h>
#include <dlfcn.h>
#include <string.h>

#include <algorithm>

#include "races.h"

namespace emulator {
namespace {

void (*body)(const void*);
const void* context;

void start_cluster(unsigned cluster) {
  for (unsigned i = 0; i < machine.launch.cluster; ++i) {
    for (Warp& warp : machine.ctas[cluster * machine.launch.cluster + i]->warps) make_ready(warp, kAllLanes);
  }
}

// A cluster that has not begun yet takes the place of one that has ended.
void start_another(const Cta& ended) {
  const unsigned first = ended.index / machine.launch.cluster * machine.launch.cluster;
  for (unsigned i = first; i < first + machine.launch.cluster; ++i) {
    if (machine.ctas[i]->live > 0) return;
  }
  if (machine.unstarted.empty()) return;
  start_cluster(machine.unstarted.back());
  machine.unstarted.pop_back();
}

void thread_main() {
  body(context);
  Thread& thread = *machine.current;
  check_rewrites(thread);
  thread.returned = true;
  thread.doing = "has returned";
  if (!thread.warp->products.empty()) fail("wgmma is still in flight");
  --machine.live;
  if (--thread.cta->live == 0) {
    for (const Copy& copy : machine.copies) {
      if (copy.cta == thread.cta) fail("the CTA ends while a copy from line %d is in flight", copy.place.line);
    }
    for (int i = 0; i < 16; ++i) {
      const NamedBarrier& barrier = thread.cta->named[i];
      if (barrier.arrived == 0) continue;
      fail("the CTA ends with %d of %d threads at barrier %d", barrier.arrived, barrier.expected, i);
    }
    start_another(*thread.cta);
  }
  thread_left_cluster(thread);
  park();
}

// "void mla_hopper::kernel<T>(...)" -> "kernel<T>".
std::string kernel_name(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) return "a kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : info.dli_sname;
  free(demangled);
  if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
  for (size_t at; (at = name.find("mla_hopper::")) != std::string::npos;) name.erase(at, 12);
  return name.substr(0, name.find('('));
}

std::unique_ptr<Cta> make_cta(unsigned index, const Launch& launch, char* stacks) {
  auto cta = std::make_unique<Cta>();
  cta->index = index;
  cta->shared = shared_memory_of(index);
  memset(cta->shared, 0xFF, launch.shared_bytes);  // NaN in every format
  cta->unfenced.assign(launch.shared_bytes / 4 + 1, 0);
  // The compiler gives a kernel with setmaxnreg what its launch bounds leave to a thread.
  const int registers = std::min(kRegisterFile / static_cast<int>(launch.threads) / 8 * 8, 248);
  cta->free_registers = kRegisterFile - registers * static_cast<int>(launch.threads);
  cta->live = launch.threads;
  cta->warps.resize(launch.threads / 32);
  cta->units.resize(launch.shared_bytes / 16 + 1);
  const size_t copies = launch.threads + 2 * cta->warps.size(), agents = copies + kCopyAgents + launch.ctas;
  for (size_t agent = copies; agent < copies + kCopyAgents; ++agent) cta->free_copy_agents.push_back(agent);
  cta->copy_epochs.resize(agents);
  for (unsigned i = 0; i < launch.threads; ++i) {
    machine.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *machine.threads.back();
    thread.cta = cta.get();
    thread.warp = &cta->warps[i / 32];
    thread.index = i;
    thread.clock.own.resize(agents);
    thread.clock.own[i] = 1;
    cta->threads.push_back(&thread);
    thread.warp->threads[i % 32] = &thread;
    start_fiber(thread.fiber, stacks + (size_t(index) * launch.threads + i) * kStackBytes, thread_main);
  }
  for (size_t i = 0; i < cta->warps.size(); ++i) {
    Warp& warp = cta->warps[i];
    warp.cta = cta.get();
    warp.index = i;
    warp.registers = registers;
  }
  return cta;
}

// What all warps of a warpgroup have to do alike, though nothing waits for it.
void check_warpgroups() {
  for (auto& cta : machine.ctas) {
    for (size_t i = 0; i + 3 < cta->warps.size(); i += 4) {
      for (size_t j = i + 1; j < i + 4; ++j) {
        const Warp &first = cta->warps[i], &other = cta->warps[j];
        const char* what = first.products_issued != other.products_issued ? "wgmma"
                           : first.register_changes != other.register_changes || first.registers != other.registers
                               ? "setmaxnreg"
                               : nullptr;
        if (what != nullptr) {
          machine.failed = true;
          machine.error = machine.kernel + ": warps " + std::to_string(i) + " and " + std::to_string(j) + " of CTA " +
                          std::to_string(cta->index) + " are one warpgroup, but executed " + what + " differently";
        }
      }
    }
  }
}

}  // namespace

Index3 thread_index() { return {static_cast<unsigned>(machine.current->index), 0, 0}; }
Index3 block_index() {
  const unsigned index = machine.current->cta->index, x = machine.launch.x, y = machine.launch.y;
  return {index % x, index / x % y, index / (x * y)};
}
int multiprocessors() { return machine.options.multiprocessors; }
const char* error_text() { return machine.error.c_str(); }

bool run_grid(const Launch& launch, void (*kernel)(const void*), const void* arguments) {
  machine.launch = launch;
  machine.host_stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  machine.kernel = kernel_name(launch.function);
  machine.failed = false;
  machine.error.clear();
  machine.copies.clear();
  forget_accesses();
  machine.watchers.clear();
  machine.ctas.clear();
  machine.threads.clear();
  machine.mapped = nullptr;
  machine.blame = nullptr;
  machine.random.seed(machine.options.seed);
  constexpr unsigned kRates[] = {1, 4, 32, 256, 0};
  machine.copy_rate = kRates[machine.random() % 5];
  machine.product_rate = kRates[machine.random() % 5];
  machine.switch_rate = kRates[2 + machine.random() % 2];
  machine.yield_rate = kRates[2 + machine.random() % 3];
  machine.window = nullptr;  // the first to ask for an address of shared memory says which it is
  const bool resident = launch.ctas <= static_cast<unsigned>(multiprocessors());
  if (!resident || launch.ctas % launch.cluster != 0 || launch.shared_bytes > kMostShared || launch.threads % 128 != 0) {
    machine.error = machine.kernel + ": the grid is not resident or not of whole clusters, or a CTA is too large or not of whole warpgroups";
    return false;
  }
  body = kernel;
  context = arguments;
  shared_memory_of(launch.ctas - 1);
  char* stacks = fiber_stacks(size_t(launch.ctas) * launch.threads);
  machine.clusters.clear();
  machine.unstarted.clear();
  for (unsigned i = 0; i < launch.ctas; ++i) {
    machine.ctas.push_back(make_cta(i, launch, stacks));
    if (i % launch.cluster == 0) machine.clusters.push_back(std::make_unique<ClusterBarrier>());
    machine.ctas.back()->cluster = machine.clusters.back().get();
  }
  for (unsigned i = 0; i < launch.ctas / launch.cluster; ++i) machine.unstarted.push_back(i);
  std::shuffle(machine.unstarted.begin(), machine.unstarted.end(), machine.random);
  const size_t later = launch.cooperative ? 0 : machine.random() % machine.unstarted.size();
  while (machine.unstarted.size() > later) {
    start_cluster(machine.unstarted.back());
    machine.unstarted.pop_back();
  }
  machine.live = launch.ctas * launch.threads;
  run_until_done();
  machine.current = nullptr;
  if (!machine.failed) check_warpgroups();
  return !machine.failed;
}

}  // namespace emulator

// For ctypes: how the next runs go, and which memory they may touch.
struct emulator_region {
  const char* name;
  uintptr_t begin, bytes;
  int writable;
};
extern "C" void emulator_configure(uint64_t seed, int multiprocessors, const emulator_region* regions, int count) {
  emulator::Options& options = emulator::machine.options;
  options.seed = seed;
  options.multiprocessors = multiprocessors;
  options.regions.clear();
  for (const emulator_region* one = regions; one < regions + count; ++one) {
    options.regions.push_back({one->name, one->begin, one->bytes, one->writable != 0});
  }
}
