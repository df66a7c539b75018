// Instructions that a whole warp executes together (PTX ISA: shfl.sync, vote.sync, redux.sync, bar.warp.sync,
// setmaxnreg).
#include <string.h>

#include <algorithm>

#include "races.h"

namespace emulator {

void collective(const char* name, Place place, void* argument, bool (*action)(Warp& warp, void* const* arguments)) {
  Thread& thread = enter(name, place);
  Warp& warp = *thread.warp;
  if (warp.arrived == 0) {
    warp.collective = name;
    warp.collective_place = place;
  } else if (strcmp(warp.collective, name) != 0 || warp.collective_place.line != place.line) {
    fail("the warp diverges: other lanes are in %s at line %d of %s", warp.collective, warp.collective_place.line,
         warp.collective_place.file);
  }
  warp.arguments[thread.lane()] = argument;
  warp.arrived |= 1u << thread.lane();
  if (warp.arrived != kAllLanes) {
    park();
    return;
  }
  warp.arrived = 0;
  warp_gathered(warp);
  if (action(warp, warp.arguments)) {
    make_ready(warp, kAllLanes);
  } else {
    park();
  }
}

namespace {

void check_mask(uint32_t mask) {
  if (mask != kAllLanes) fail("mask 0x%x leaves lanes out, which is not emulated", mask);
}

struct ShuffleArgument {
  Shuffle kind;
  uint32_t value;
  int operand;
  uint32_t result;
};

struct VoteArgument {
  bool predicate;
  uint32_t result;
};

struct ReduceArgument {
  Reduction kind;
  int64_t value, result;
};

struct RegistersArgument {
  bool grow;
  int registers;
};

bool exchange(Warp&, void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<ShuffleArgument*>(arguments[lane]);
    int source = lane;
    switch (mine.kind) {
      case Shuffle::kIndex: source = mine.operand & 31; break;
      case Shuffle::kUp: source = lane >= mine.operand ? lane - mine.operand : lane; break;
      case Shuffle::kXor: source = lane ^ (mine.operand & 31); break;
    }
    mine.result = static_cast<ShuffleArgument*>(arguments[source])->value;
  }
  return true;
}

bool vote(Warp&, void* const* arguments) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= uint32_t(static_cast<VoteArgument*>(arguments[lane])->predicate) << lane;
  for (int lane = 0; lane < 32; ++lane) static_cast<VoteArgument*>(arguments[lane])->result = votes;
  return true;
}

bool combine(Warp&, void* const* arguments) {
  const auto& first = *static_cast<ReduceArgument*>(arguments[0]);
  int64_t result = first.value;
  for (int lane = 1; lane < 32; ++lane) {
    const int64_t value = static_cast<ReduceArgument*>(arguments[lane])->value;
    switch (first.kind) {
      case Reduction::kAdd: result += value; break;
      case Reduction::kMin: result = std::min(result, value); break;
      case Reduction::kMax: result = std::max(result, value); break;
    }
  }
  for (int lane = 0; lane < 32; ++lane) static_cast<ReduceArgument*>(arguments[lane])->result = result;
  return true;
}

// Registers given back become free for whoever asks for more; who asks waits until there are enough.
bool change_registers(Warp& warp, void* const* arguments) {
  const auto& wanted = *static_cast<RegistersArgument*>(arguments[0]);
  Cta& cta = *warp.cta;
  const int difference = wanted.registers - warp.registers;
  if (wanted.registers % 8 != 0 || wanted.registers < 24 || wanted.registers > 256) {
    fail("%d registers: setmaxnreg takes multiples of 8 from 24 to 256", wanted.registers);
  }
  if (wanted.grow ? difference < 0 : difference > 0) {
    fail("%s to %d registers, the threads have %d", wanted.grow ? "growing" : "shrinking", wanted.registers, warp.registers);
  }
  ++warp.register_changes;
  warp.registers = wanted.registers;
  const int needed = difference * 32;
  if (needed <= cta.free_registers) {
    cta.free_registers -= needed;
    return true;
  }
  wait_until(warp, kAllLanes, [&cta, needed] {
    if (needed > cta.free_registers) return false;
    cta.free_registers -= needed;
    return true;
  });
  return false;
}

}  // namespace

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, Place place) {
  check_mask(mask);
  ShuffleArgument argument = {kind, value, operand, 0};
  collective("__shfl_sync", place, &argument, exchange);
  return argument.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Place place) {
  check_mask(mask);
  VoteArgument argument = {predicate, 0};
  collective("a vote", place, &argument, vote);
  return argument.result;
}

int64_t reduce(Reduction kind, uint32_t mask, int64_t value, Place place) {
  check_mask(mask);
  ReduceArgument argument = {kind, value, 0};
  collective("__reduce_sync", place, &argument, combine);
  return argument.result;
}

void sync_warp(uint32_t mask, Place place) {
  check_mask(mask);
  if (dropped("__syncwarp", place)) return;
  collective("__syncwarp", place, nullptr, [](Warp& warp, void* const*) {
    Clock clock;
    for (Thread* thread : warp.threads) release(*thread, clock);
    for (Thread* thread : warp.threads) acquire(*thread, clock);
    return true;
  });
}

void set_registers(bool grow, int registers, Place place) {
  RegistersArgument argument = {grow, registers};
  collective("setmaxnreg", place, &argument, change_registers);
}

}  // namespace emulator
