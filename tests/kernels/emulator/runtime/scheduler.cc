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

// Groups of lanes that wait at the same place, the likely causes first: not those that only wait for their warp.
std::string who_waits() {
  std::string text;
  char line[256];
  for (auto& cta : machine.ctas) {
    for (Warp& warp : cta->warps) {
      for (int lane = 0; lane < 32;) {
        const Thread& first = *warp.threads[lane];
        int end = lane + 1;
        while (end < 32 && warp.threads[end]->returned == first.returned && warp.threads[end]->place.line == first.place.line &&
               warp.threads[end]->doing == first.doing && warp.threads[end]->operand[0] == first.operand[0]) {
          ++end;
        }
        if (!first.returned) {
          snprintf(line, sizeof line, "\n  CTA %u warp %d lanes %d-%d: %s at %s:%d", cta->index, warp.index, lane, end - 1,
                   first.doing, file_name(first.place), first.place.line);
          text += line;
          const auto barrier = cta->mbarriers.find(first.operand[0]);
          if (strstr(first.doing, "mbarrier_wait") && barrier != cta->mbarriers.end()) {
            const MBarrier& b = barrier->second;
            snprintf(line, sizeof line, " for phase of parity %u of 0x%x, which is in phase %u: %u of %u arrivals, %lld bytes missing",
                     first.operand[1], first.operand[0], b.phase, b.pending, b.arrivals, static_cast<long long>(b.bytes));
            text += line;
          } else if (strstr(first.doing, "named_sync")) {
            const NamedBarrier& b = cta->named[first.operand[0] & 15];
            snprintf(line, sizeof line, " of barrier %u: %d of %d threads", first.operand[0], b.arrived, b.expected);
            text += line;
          }
        }
        lane = end;
        if (text.size() > 900) return text + "\n  ...";
      }
    }
  }
  return text;
}

// The next warp to run; nullptr when none ever will.
Warp* pick() {
  static Cta* cta;
  while (true) {
    std::vector<Cta*>& candidates = *[] {
      static std::vector<Cta*> list;
      return &list;
    }();
    const bool keep = machine.mapped != nullptr && !machine.mapped->ready.empty() && !machine.one_in(machine.switch_rate);
    if (keep) {
      cta = machine.mapped;
    } else {
      candidates.clear();
      for (auto& one : machine.ctas) {
        if (!one->ready.empty()) candidates.push_back(one.get());
      }
      if (candidates.empty()) {
        if (wake_watchers() || advance_something()) continue;
        return nullptr;
      }
      cta = candidates[machine.random() % candidates.size()];
    }
    return cta->ready[machine.random() % cta->ready.size()];
  }
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
      if (!machine.copies.empty() && machine.one_in(machine.copy_rate)) execute_copy(machine.random() % machine.copies.size());
      if (machine.one_in(machine.product_rate)) {
        Warp& lucky = warp->cta->warps[machine.random() % warp->cta->warps.size()];
        if (products_waiting(lucky)) execute_product(lucky);
      }
    }
  } catch (const Failed&) {
  }
}

}  // namespace emulator
