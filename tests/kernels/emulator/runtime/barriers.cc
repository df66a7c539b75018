// Named barriers (PTX ISA: bar.sync, bar.arrive, aligned) and mbarriers (PTX ISA: "Asynchronous Barrier").
#include "races.h"

namespace emulator {
namespace {

struct NamedArgument {
  int barrier, threads;
  bool wait;
};

// A warp arrives as 32 threads.
bool arrive(Warp& warp, void* const* arguments) {
  const auto argument = *static_cast<NamedArgument*>(arguments[0]);
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<NamedArgument*>(arguments[lane]);
    if (other.barrier != argument.barrier || other.threads != argument.threads) {
      fail("lanes of a warp name different barriers: %d and %d", argument.barrier, other.barrier);
    }
  }
  if (argument.barrier < 0 || argument.barrier > 15 || argument.threads % 32 != 0) {
    fail("barrier %d with %d threads: barriers are 0 to 15, for whole warps", argument.barrier, argument.threads);
  }
  NamedBarrier& barrier = warp.cta->named[argument.barrier];
  if (barrier.arrived == 0) barrier.expected = argument.threads;
  if (barrier.expected != argument.threads) {
    fail("barrier %d for %d threads, others who arrived have said %d", argument.barrier, argument.threads, barrier.expected);
  }
  barrier.arrived += 32;
  for (Thread* thread : warp.threads) release(*thread, barrier.clock);
  if (argument.wait) barrier.waiting.push_back(&warp);
  if (barrier.arrived < barrier.expected) return !argument.wait;
  for (Warp* waiting : barrier.waiting) {
    for (Thread* thread : waiting->threads) acquire(*thread, barrier.clock);
    if (waiting != &warp) make_ready(*waiting, kAllLanes);
  }
  barrier = {};
  return true;
}

void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  barrier.arrived.join_with(barrier.arriving);
  barrier.arriving.clear();
  for (Thread* thread : barrier.waiting) make_ready(*thread->warp, 1u << thread->lane());
  barrier.waiting.clear();
}

bool passed(const MBarrier& barrier, uint32_t parity) { return (barrier.phase & 1) != (parity & 1); }

}  // namespace

MBarrier& mbarrier_of(const Thread& thread, Cta& cta, uint32_t address) {
  shared_at(cta, address, 8, 8);
  const auto found = cta.mbarriers.find(address);
  if (found == cta.mbarriers.end()) fail("0x%x is no initialised mbarrier", address);
  const MBarrier& barrier = found->second;
  const Access& initialised = barrier.initialised;
  const bool by_cluster = barrier.announced && thread.warp->cluster_waits > barrier.announced_in;
  if (!by_cluster && initialised.epoch > known_of(thread, cta)[initialised.agent]) {
    fail("a race: thread %d has initialised 0x%x, and nothing orders that before", initialised.agent, address);
  }
  return found->second;
}

void named_barrier(int barrier, int threads, bool wait, Place place) {
  const char* name = wait ? "named_sync" : "named_arrive";
  if (dropped(name, place)) return;
  machine.current->operand[0] = barrier;
  NamedArgument argument = {barrier, threads, wait};
  collective(name, place, &argument, arrive);
}

void sync_cta(Place place) {
  if (dropped("__syncthreads", place)) return;
  machine.current->operand[0] = 0;
  NamedArgument argument = {0, static_cast<int>(machine.launch.threads), true};
  collective("__syncthreads (named_sync)", place, &argument, arrive);
}

void mbarrier_init(uint32_t barrier, uint32_t arrivals, Place place) {
  Thread& thread = enter("mbarrier_init", place);
  shared_at(*thread.cta, barrier, 8, 8);
  if (arrivals < 1 || arrivals > (1 << 20) - 1) fail("%u arrivals: an mbarrier takes 1 to 2^20 - 1", arrivals);
  MBarrier& b = thread.cta->mbarriers[barrier] = {arrivals, arrivals};
  b.initialised = {thread.clock.own[thread.index], static_cast<uint16_t>(thread.index)};
}

// PTX ISA, fence.mbarrier_init: makes this thread's initialisations visible to the async proxy.
void mbarrier_init_fence(Place place) {
  if (dropped("mbarrier_init_fence", place)) return;
  const Thread& thread = enter("mbarrier_init_fence", place);
  for (auto& [address, barrier] : thread.cta->mbarriers) {
    if (barrier.initialised.agent != thread.index) continue;
    barrier.announced = true;
    barrier.announced_in = thread.warp->cluster_arrivals;
  }
}

void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Place place) {
  const char* name = expected_bytes ? "mbarrier_expect" : "mbarrier_arrive";
  if (dropped(name, place)) return;
  Thread& thread = enter(name, place);
  MBarrier& b = mbarrier_of(thread, *thread.cta, barrier);
  b.bytes += expected_bytes;
  b.unasked += expected_bytes;
  if (b.bytes >= 1 << 20) {
    fail("0x%x expects %lld bytes, an mbarrier counts to 2^20 - 1", barrier, static_cast<long long>(b.bytes));
  }
  arrive_at(thread, *thread.cta, b);
}

void arrive_at(Thread& thread, const Cta& cta, MBarrier& barrier) {
  if (barrier.pending == 0) {
    fail("all %u arrivals of phase %u have come, %lld bytes are missing: one arrival too many", barrier.arrivals,
         barrier.phase, static_cast<long long>(barrier.bytes));
  }
  barrier.remote |= &cta != thread.cta;
  --barrier.pending;
  release_to(thread, cta, barrier.arriving);
  end_phase_if_complete(barrier);
}

// The kernels announce bytes before they ask for them. More is a wrong number, though the ISA allows to announce it later.
void ask_for_copy(const Thread& thread, Cta& cta, uint32_t barrier, uint32_t bytes) {
  MBarrier& b = mbarrier_of(thread, cta, barrier);
  b.remote |= &cta != thread.cta;
  if (!b.announced) fail("the copy engine may not see that 0x%x is initialised: no mbarrier_init_fence since", barrier);
  b.unasked -= bytes;
  const long long more = -b.unasked;
  if (more > 0) fail("%u bytes are %lld more than phase %u of 0x%x expects", bytes, more, b.phase, barrier);
}

void complete_copy(const Copy& copy) {
  MBarrier& b = copy.cta->mbarriers.at(copy.barrier);
  b.bytes -= copy.bytes;
  if (copy.clock != nullptr) b.arriving.join_with(*copy.clock);
  b.arriving.own.resize(copy.cta->copy_epochs.size());
  if (b.arriving.own[copy.agent] < copy.epoch) b.arriving.own[copy.agent] = copy.epoch;
  end_phase_if_complete(b);
}

// PTX ISA, mbarrier.try_wait: what others of the cluster did is known after a wait in the cluster's scope.
void mbarrier_wait(uint32_t barrier, uint32_t parity, bool cluster_scope, Place place) {
  if (dropped("mbarrier_wait", place)) return;
  parity ^= inverted(place);
  Thread& thread = enter("mbarrier_wait", place);
  MBarrier& b = mbarrier_of(thread, *thread.cta, barrier);
  thread.operand[0] = barrier;
  thread.operand[1] = parity;
  while (!passed(b, parity)) {
    b.waiting.push_back(&thread);
    park();
  }
  if (b.remote && !cluster_scope) fail("waits in the CTA's scope for 0x%x, where others of the cluster arrive", barrier);
  acquire(thread, b.arrived);
}

// May miss a phase that has just completed, as an earlier test would have; all lanes of a warp alike.
bool mbarrier_test(uint32_t barrier, uint32_t parity, Place place) {
  Thread& thread = enter("mbarrier_test", place);
  const MBarrier& b = mbarrier_of(thread, *thread.cta, barrier);
  const Warp& warp = *thread.warp;
  const bool early = (machine.options.seed + warp.index + warp.gatherings) * 0x9E3779B97F4A7C15u >> 62 == 0;
  if (!passed(b, parity) || early) return false;
  acquire(thread, b.arrived);
  return true;
}

}  // namespace emulator
