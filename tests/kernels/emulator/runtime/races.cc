#include "races.h"

#include <stdio.h>

#include <map>

namespace emulator {
namespace {

std::vector<Place> places;
std::unordered_map<const void*, std::vector<std::shared_ptr<const Epochs>>> released;  // by CTA

uint16_t number_of(Place place) {
  static std::map<std::pair<const char*, int>, uint16_t> numbers;
  static Place last = {nullptr, 0};
  static uint16_t last_number = 0;
  if (place.file == last.file && place.line == last.line) return last_number;
  const auto [at, fresh] = numbers.emplace(std::make_pair(place.file, place.line), static_cast<uint16_t>(places.size()));
  if (fresh) places.push_back(place);
  last = place;
  return last_number = at->second;
}

std::string agent_name(const Cta& cta, uint16_t agent) {
  const size_t threads = cta.threads.size(), warps = cta.warps.size();
  if (agent < threads) return "thread " + std::to_string(agent);
  if (agent < threads + warps) return "the tensor core of warp " + std::to_string(agent - threads);
  if (agent >= remote_stores(cta, *machine.ctas[0])) {
    return "a thread of CTA " + std::to_string(agent - remote_stores(cta, *machine.ctas[0]));
  }
  return "a copy";
}

void race(const char* what, const char* where, const Cta& cta, const Access& other, const char* how) {
  const Place place = places[other.place];
  fail("a race: %s %s, which %s %s at or after %s:%d, and nothing orders the two", what, where,
       agent_name(cta, other.agent).c_str(), how, file_name(place), place.line);
}

std::string shared_word(uint32_t word) {
  char text[64];
  snprintf(text, sizeof text, "shared address 0x%x", machine.shared_base + 4 * word);
  return text;
}

uint32_t first_word(uint32_t address) { return (address - machine.shared_base) / 4; }
uint32_t last_word(uint32_t address, uint32_t bytes) { return (address - machine.shared_base + bytes - 1) / 4; }

bool covers(const Epochs& known, const Access& access) { return access.epoch <= known[access.agent]; }

bool read_before_gathering(const Cta& cta, const Epochs& known, const Unit::Read& read) {
  return read.access.agent < cta.threads.size() && read.gathering <= known[gatherings(cta.warps[read.access.agent / 32])];
}

// Notes a read of some words of a unit, in the place of an older one by the same agent.
void note_read(Unit& unit, const Access& access, uint32_t gathering, uint8_t words) {
  for (Unit::Read& read : unit.reads) {
    if (read.access.agent == access.agent && read.words == words) {
      read.access = access;
      read.gathering = gathering;
      return;
    }
  }
  unit.reads.push_back({access, gathering, words});
}

void read_words(Cta& cta, const Access& access, const Epochs& known, uint32_t first, uint32_t last) {
  const uint32_t gathering = access.agent < cta.threads.size() ? cta.warps[access.agent / 32].gatherings : 0;
  for (uint32_t word = first; word <= last; ++word) {
    Unit& unit = cta.units[word / 4];
    const Access& write = unit.writes[word & 3];
    if (!covers(known, write)) race("reads", shared_word(word).c_str(), cta, write, "wrote");
    if (word == last || (word & 3) == 3) {
      const uint32_t begin = std::max(first, word & ~3u);
      note_read(unit, access, gathering, ((2u << (word & 3)) - 1) & ~((1u << (begin & 3)) - 1));
    }
  }
}

void write_words(Cta& cta, const Access& access, const Epochs& known, uint32_t first, uint32_t last) {
  for (uint32_t word = first; word <= last; ++word) {
    Unit& unit = cta.units[word / 4];
    Access& write = unit.writes[word & 3];
    if (!covers(known, write)) race("writes", shared_word(word).c_str(), cta, write, "wrote");
    for (size_t i = 0; i < unit.reads.size();) {
      Unit::Read& read = unit.reads[i];
      if (!(read.words >> (word & 3) & 1)) {
        ++i;
        continue;
      }
      if (!covers(known, read.access) && !read_before_gathering(cta, known, read)) {
        race("writes", shared_word(word).c_str(), cta, read.access, "reads");
      }
      read.words &= ~(1u << (word & 3));
      if (read.words != 0) {
        ++i;
        continue;
      }
      read = unit.reads.back();
      unit.reads.pop_back();
    }
    write = access;
  }
}

Access by(Thread& thread) {
  return {thread.clock.own[thread.index], static_cast<uint16_t>(thread.index), number_of(thread.place)};
}

struct GlobalWrite {
  Access access;
  uint32_t cta = 0;
};
std::unordered_map<uintptr_t, std::vector<GlobalWrite>> global_writes;  // by region's begin, for each word

GlobalWrite* global_words(const Region& region, uintptr_t offset) {
  std::vector<GlobalWrite>& words = global_writes[region.begin];
  if (words.empty()) words.resize(region.bytes / 4 + 1);
  return &words[offset / 4];
}

// Whether `clock`, of a thread of `cta`, covers the write.
bool knows_of(const Cta& cta, const Clock& clock, const GlobalWrite& write) {
  const Access& access = write.access;
  if (access.epoch == 0) return true;
  const Epochs* known = nullptr;
  if (write.cta == cta.index) {
    known = &clock.own;
  } else if (write.cta < clock.others.size()) {
    known = clock.others[write.cta].get();
  }
  return known != nullptr && access.agent < known->size() && covers(*known, access);
}

bool knows_of(const Thread& thread, const GlobalWrite& write) { return knows_of(*thread.cta, thread.clock, write); }

void global_race(const char* what, const Region& region, uintptr_t offset, const GlobalWrite& write) {
  const std::string where = region.name + " + " + std::to_string(offset);
  const std::string how = "of CTA " + std::to_string(write.cta) + " wrote";
  race(what, where.c_str(), *machine.ctas[write.cta], write.access, how.c_str());
}

// A write over somebody else's, until it is seen whether it changes anything.
struct Rewrite {
  const Region* region;
  uintptr_t offset;
  uint32_t before;
  GlobalWrite write;
};
std::unordered_map<const Thread*, std::vector<Rewrite>> rewrites;

uint32_t word_at(const Region& region, uintptr_t offset) {
  return *reinterpret_cast<const uint32_t*>(region.begin + (offset & ~3ull));
}

}  // namespace

uint16_t tensor_core(const Warp& warp) { return warp.cta->threads.size() + warp.index; }

uint16_t gatherings(const Warp& warp) { return warp.cta->threads.size() + warp.cta->warps.size() + warp.index; }

void warp_gathered(Warp& warp) {
  for (Thread* thread : warp.threads) thread->clock.own[gatherings(warp)] = warp.gatherings;
  ++warp.gatherings;
}

uint16_t take_copy_agent(Cta& cta) {
  if (cta.free_copy_agents.empty()) fail("more than %d copies in flight", kCopyAgents);
  const uint16_t agent = cta.free_copy_agents.back();
  cta.free_copy_agents.pop_back();
  return agent;
}

uint16_t remote_stores(const Cta& cta, const Cta& by) {
  return cta.copy_epochs.size() - machine.launch.ctas + by.index;
}

const Epochs& known_of(const Thread& thread, const Cta& cta) {
  if (&cta == thread.cta) return thread.clock.own;
  const auto& others = thread.clock.others;
  if (cta.index < others.size() && others[cta.index] != nullptr) return *others[cta.index];
  static Epochs nothing;
  nothing.assign(cta.copy_epochs.size(), 0);
  return nothing;
}

void acquire(Thread& thread, const Clock& clock) {
  thread.clock.join_with(clock);
  ++thread.acquired;
}

void release(Thread& thread, Clock& clock) {
  clock.join_with(thread.clock);
  ++thread.clock.own[thread.index];
}

void release_to(Thread& thread, const Cta& cta, Clock& clock) {
  if (&cta == thread.cta) return release(thread, clock);
  join(clock.own, known_of(thread, cta));
  clock.join_other(thread.cta->index, std::make_shared<Epochs>(thread.clock.own));
  for (size_t other = 0; other < thread.clock.others.size(); ++other) {
    if (other != cta.index) clock.join_other(other, thread.clock.others[other]);
  }
  ++thread.clock.own[thread.index];
}

void thread_reads(Thread& thread, uint32_t address, uint32_t bytes) {
  read_words(*thread.cta, by(thread), thread.clock.own, first_word(address), last_word(address, bytes));
}

void thread_writes(Thread& thread, uint32_t address, uint32_t bytes) {
  write_words(*thread.cta, by(thread), thread.clock.own, first_word(address), last_word(address, bytes));
}

void tensor_core_reads(Cta& cta, uint16_t agent, uint32_t epoch, const Clock& clock, Place place, uint32_t address) {
  read_words(cta, {epoch, agent, number_of(place)}, clock.own, first_word(address), last_word(address, 16));
}

void copy_writes(Thread& issuer, const Copy& copy) {
  const Access access = {copy.epoch, copy.agent, number_of(copy.place)};
  const uint32_t first = first_word(copy.destination), last = last_word(copy.destination, copy.bytes);
  write_words(*copy.cta, access, known_of(issuer, *copy.cta), first, last);
}

void thread_reads_global(Thread& thread, const Region& region, uintptr_t offset, uint32_t bytes) {
  const GlobalWrite* words = global_words(region, offset);
  for (uint32_t i = 0; i < (bytes + 3) / 4; ++i) {
    if (words[i].access.epoch == 0) {
      fail("reads %s + %zu, which nobody has written in this launch", region.name.c_str(), offset + 4 * i);
    }
    if (!knows_of(thread, words[i])) global_race("reads", region, offset + 4 * i, words[i]);
  }
}

void copy_reads_global(Thread& thread, const Region& region, uintptr_t offset, uint32_t bytes) {
  thread_reads_global(thread, region, offset, bytes);
  const GlobalWrite* words = global_words(region, offset);
  for (uint32_t i = 0; i < (bytes + 3) / 4; ++i) {
    if (!knows_of(*thread.cta, thread.announced, words[i])) {
      fail("a copy reads %s + %zu, written at %s:%d, without a proxy fence for global memory since", region.name.c_str(),
           offset + 4 * i, file_name(places[words[i].access.place]), places[words[i].access.place].line);
    }
  }
}

void thread_writes_global(Thread& thread, const Region& region, uintptr_t offset, uint32_t bytes) {
  GlobalWrite* words = global_words(region, offset);
  for (uint32_t i = 0; i < (bytes + 3) / 4; ++i) {
    if (!knows_of(thread, words[i])) {
      rewrites[&thread].push_back({&region, offset + 4 * i, word_at(region, offset + 4 * i), words[i]});
    }
    words[i] = {by(thread), thread.cta->index};
  }
}

void check_rewrites(Thread& thread) {
  if (rewrites.empty()) return;
  const auto found = rewrites.find(&thread);
  if (found == rewrites.end()) return;
  const std::vector<Rewrite> mine = std::move(found->second);
  rewrites.erase(found);
  for (const Rewrite& one : mine) {
    if (word_at(*one.region, one.offset) != one.before) global_race("writes", *one.region, one.offset, one.write);
  }
}

void release_global(Thread& thread, const void* address) {
  auto& clocks = released[address];
  clocks.resize(machine.ctas.size());
  Clock clock;
  clock.others = clocks;
  clock.join_other(thread.cta->index, std::make_shared<Epochs>(thread.clock.own));
  for (size_t cta = 0; cta < thread.clock.others.size(); ++cta) clock.join_other(cta, thread.clock.others[cta]);
  clocks = clock.others;
  ++thread.clock.own[thread.index];
}

void acquire_global(Thread& thread, const void* address) {
  const auto found = released.find(address);
  if (found == released.end()) return;
  for (size_t cta = 0; cta < found->second.size(); ++cta) {
    if (found->second[cta] == nullptr) continue;
    if (cta == thread.cta->index) {
      join(thread.clock.own, *found->second[cta]);
    } else {
      thread.clock.join_other(cta, found->second[cta]);
    }
  }
  ++thread.acquired;
}

void forget_accesses() {
  released.clear();
  rewrites.clear();
  global_writes.clear();
}

}  // namespace emulator
