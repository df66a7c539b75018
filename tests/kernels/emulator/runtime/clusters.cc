// Clusters (PTX ISA: barrier.cluster, mapa, st.async). An address in another CTA of the cluster is the shared address there,
// with the CTA's rank + 1 above it.
#include <string.h>

#include "races.h"

namespace emulator {
namespace {

constexpr int kRankShift = 24;

// The CTA that an address is in; `address` becomes the shared address there.
Cta& owner(const Thread& thread, uint32_t& address) {
  const uint32_t rank = address >> kRankShift;
  if (rank == 0) return *thread.cta;
  address &= (1u << kRankShift) - 1;
  const unsigned first = thread.cta->index / machine.launch.cluster * machine.launch.cluster;
  Cta& cta = *machine.ctas[first + rank - 1];
  if (cta.live == 0) fail("CTA %u of the cluster has ended", rank - 1);
  return cta;
}

bool has_arrived(const Warp& warp, unsigned phase) {
  if (warp.cluster_arrivals > phase) return true;
  for (const Thread* thread : warp.threads) {
    if (!thread->returned) return false;
  }
  return true;
}

void end_phase_if_complete(const Cta& cta) {
  ClusterBarrier& barrier = *cta.cluster;
  const unsigned first = cta.index / machine.launch.cluster * machine.launch.cluster;
  for (unsigned i = first; i < first + machine.launch.cluster; ++i) {
    for (const Warp& warp : machine.ctas[i]->warps) {
      if (!has_arrived(warp, barrier.phase)) return;
    }
  }
  ++barrier.phase;
  for (Warp* warp : barrier.waiting) make_ready(*warp, kAllLanes);
  barrier.waiting.clear();
}

bool arrive(Warp& warp, void* const*) {
  if (warp.cluster_arrivals != warp.cluster_waits) fail("arrives once more before it has waited");
  ++warp.cluster_arrivals;
  end_phase_if_complete(*warp.cta);
  return true;
}

bool wait(Warp& warp, void* const*) {
  ClusterBarrier& barrier = *warp.cta->cluster;
  if (warp.cluster_waits == warp.cluster_arrivals) fail("waits without having arrived");
  const unsigned phase = warp.cluster_waits++;
  if (barrier.phase != phase) return true;
  barrier.waiting.push_back(&warp);
  return false;
}

}  // namespace

uint32_t cluster_rank() { return machine.current->cta->index % machine.launch.cluster; }

void cluster_barrier(bool waits, Place place) {
  const char* name = waits ? "cluster_wait" : "cluster_arrive";
  if (dropped(name, place)) return;
  collective(name, place, nullptr, waits ? wait : arrive);
}

// Threads that have ended are not waited for.
void thread_left_cluster(Thread& thread) {
  if (machine.launch.cluster > 1) end_phase_if_complete(*thread.cta);
}

uint32_t cluster_address(uint32_t address, uint32_t rank, Place place) {
  Thread& thread = enter("cluster_address", place);
  if (rank >= machine.launch.cluster) fail("CTA %u of a cluster of %u", rank, machine.launch.cluster);
  shared_at(*thread.cta, address, 1, 1);
  return address | (rank + 1) << kRankShift;
}

// Whoever waits for the bytes learns of the store, not of what its thread did before.
void store_cluster(uint32_t address, const void* source, uint32_t bytes, uint32_t barrier, Place place) {
  Thread& thread = enter("store_cluster", place);
  Copy copy = {};
  copy.cta = &owner(thread, address);
  if (&owner(thread, barrier) != copy.cta) fail("the barrier 0x%x is of another CTA than what is stored", barrier);
  shared_at(*copy.cta, address, bytes, bytes);
  copy.destination = address;
  copy.bytes = bytes;
  copy.barrier = barrier;
  copy.remote = true;
  memcpy(copy.stored, source, bytes);
  copy.asker = thread.cta;
  copy.thread = thread.index;
  copy.place = place;
  copy.agent = remote_stores(*copy.cta, *thread.cta);
  copy.epoch = ++copy.cta->copy_epochs[copy.agent];
  ask_for_copy(thread, *copy.cta, barrier, bytes);
  copy_writes(thread, copy);
  memset(copy.cta->shared + (address - machine.shared_base), 0xFF, bytes);
  machine.copies.push_back(copy);
}

}  // namespace emulator
