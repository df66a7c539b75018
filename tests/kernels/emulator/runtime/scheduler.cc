// Which thread goes on, and when asynchronous work is done. Everything is drawn from the seed.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "races.h"

namespace emulator {

Machine machine;

namespace {

struct Failed {};

void to_scheduler(Thread& thread) { switch_fiber(thread.fiber, machine.scheduler); }

bool wake_watchers() {
  bool any = false;
  auto& watchers = machine.watchers;
  for (size_t i = 0; i < watchers.size();) {
    if (!watchers[i].ready()) {
      ++i;
      continue;
    }
    make_ready(*watchers[i].warp, watchers[i].lanes);
    watchers[i] = watchers.back();
    watchers.pop_back();
    any = true;
  }
  return any;
}

// One piece of asynchronous work that has not been done yet; false when there is none.
bool advance_something() {
  std::vector<Warp*> warps;
  for (auto& cta : machine.ctas) {
    for (Warp& warp : cta->warps) {
      if (products_waiting(warp)) warps.push_back(&warp);
    }
  }
  const size_t choices = warps.size() + machine.copies.size();
  if (choices == 0) return false;
  const size_t choice = machine.random() % choices;
  if (choice < warps.size()) {
    execute_product(*warps[choice]);
  } else {
    execute_copy(choice - warps.size());
  }
  return true;
}

bool waits_alike(const Thread& one, const Thread& other) {
  return one.returned == other.returned && one.doing == other.doing && one.place.line == other.place.line &&
         one.operand[0] == other.operand[0] && one.operand[1] == other.operand[1];
}

std::string how_it_waits(const Cta& cta, const Thread& thread) {
  char text[192] = "";
  const auto found = cta.mbarriers.find(thread.operand[0]);
  if (strstr(thread.doing, "mbarrier_wait") && found != cta.mbarriers.end()) {
    const MBarrier& b = found->second;
    snprintf(text, sizeof text, " for parity %u of 0x%x: in phase %u, %u of %u arrivals and %lld bytes are missing",
             thread.operand[1], thread.operand[0], b.phase, b.pending, b.arrivals, static_cast<long long>(b.bytes));
  } else if (strstr(thread.doing, "named_sync")) {
    const NamedBarrier& b = cta.named[thread.operand[0] & 15];
    snprintf(text, sizeof text, " at barrier %u: %d of %d threads are there", thread.operand[0], b.arrived, b.expected);
  }
  return text;
}

// Who waits where, threads in a row that wait alike as one.
std::string who_waits() {
  std::string text;
  char line[256];
  for (auto& cta : machine.ctas) {
    for (size_t i = 0, end; i < cta->threads.size(); i = end) {
      const Thread& first = *cta->threads[i];
      for (end = i + 1; end < cta->threads.size() && waits_alike(first, *cta->threads[end]);) ++end;
      if (first.returned) continue;
      snprintf(line, sizeof line, "\n  CTA %u threads %zu-%zu: %s at %s:%d", cta->index, i, end - 1, first.doing,
               file_name(first.place), first.place.line);
      text += line + how_it_waits(*cta, first);
      if (text.size() > 1200) return text + "\n  ...";
    }
  }
  return text;
}

// The next warp to run; nullptr when none ever will.
Warp* pick() {
  Cta* cta = machine.mapped;
  if (cta == nullptr || cta->ready.empty() || machine.one_in(machine.switch_rate)) {
    std::vector<Cta*> candidates;
    while (true) {
      for (auto& one : machine.ctas) {
        if (!one->ready.empty()) candidates.push_back(one.get());
      }
      if (!candidates.empty()) break;
      if (!wake_watchers() && !advance_something()) return nullptr;
    }
    cta = candidates[machine.random() % candidates.size()];
  }
  return cta->ready[machine.random() % cta->ready.size()];
}

void run_warp(Warp& warp) {
  map_shared(*warp.cta);
  const int first = machine.random() % 32;
  uint32_t lanes = warp.ready;
  for (int i = 0; i < 32 && !machine.failed; ++i) {
    const int lane = (first + i) & 31;
    if (!(lanes >> lane & 1) || !(warp.ready >> lane & 1)) continue;
    machine.current = warp.threads[lane];
    switch_fiber(machine.scheduler, machine.current->fiber);
    machine.current = nullptr;
  }
}

}  // namespace

void make_ready(Warp& warp, uint32_t lanes) {
  if (warp.ready == 0 && lanes != 0) warp.cta->ready.push_back(&warp);
  warp.ready |= lanes;
}

void park() {
  Thread& thread = *machine.current;
  Warp& warp = *thread.warp;
  warp.ready &= ~(1u << thread.lane());
  if (warp.ready == 0) {
    auto& list = warp.cta->ready;
    list.erase(std::find(list.begin(), list.end(), &warp));
  }
  to_scheduler(thread);
}

void wait_until(Warp& warp, uint32_t lanes, std::function<bool()> ready) {
  machine.watchers.push_back({&warp, lanes, std::move(ready)});
}

Thread& enter(const char* doing, Place place) {
  Thread& thread = *machine.current;
  check_rewrites(thread);
  thread.doing = doing;
  thread.place = place;
  if (machine.one_in(machine.yield_rate)) to_scheduler(thread);  // still ready
  return thread;
}

void fail(const char* format, ...) {
  Thread* thread = machine.current;
  const Blame blame = machine.blame ? *machine.blame : Blame{thread->cta, thread->index, thread->doing, thread->place};
  char where[256], text[512];
  snprintf(where, sizeof where, "%s, CTA %u, warp %d, lane %d (thread %d), %s at %s:%d: ", machine.kernel.c_str(),
           blame.cta->index, blame.thread / 32, blame.thread % 32, blame.thread, blame.doing, file_name(blame.place),
           blame.place.line);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.failed = true;
  machine.error = std::string(where) + text;
  if (thread == nullptr) throw Failed();
  while (true) to_scheduler(*thread);
}

void run_until_done() {
  try {
    unsigned steps = 0;
    while (machine.live > 0 && !machine.failed) {
      Warp* warp = pick();
      if (warp == nullptr) {
        machine.failed = true;
        machine.error = machine.kernel + ": deadlock, no thread can go on:" + who_waits();
        break;
      }
      run_warp(*warp);
      if (++steps % 16 == 0) wake_watchers();
      if (!machine.copies.empty() && machine.one_in(machine.copy_rate)) {
        execute_copy(machine.random() % machine.copies.size());
      }
      if (machine.one_in(machine.product_rate)) {
        Warp& lucky = warp->cta->warps[machine.random() % warp->cta->warps.size()];
        if (products_waiting(lucky)) execute_product(lucky);
      }
    }
  } catch (const Failed&) {
  }
}

}  // namespace emulator
