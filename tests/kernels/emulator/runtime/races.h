// Races in shared and global memory: two accesses to the same word, one of them a write, that no synchronisation orders.
#ifndef EMULATOR_RACES_H_
#define EMULATOR_RACES_H_

#include "machine.h"

namespace emulator {

// Agents of a CTA beside its threads.
uint16_t tensor_core(const Warp& warp);
uint16_t gatherings(const Warp& warp);
uint16_t take_copy_agent(Cta& cta);
uint16_t remote_stores(const Cta& cta, const Cta& by);

// Synchronisation: `acquire` learns what was released into a clock; `release` adds what the thread knows, and what it does
// from then on is later.
void acquire(Thread& thread, const Clock& clock);
void release(Thread& thread, Clock& clock);
// The same into a clock of another CTA.
void release_to(Thread& thread, const Cta& cta, Clock& clock);
// What the thread knows of a CTA.
const Epochs& known_of(const Thread& thread, const Cta& cta);

// All lanes have come to one instruction. It is no barrier for memory, but what they have read before has been read: a
// warp issues its loads in order. (The kernels rely on that where one lane releases what all have read.)
void warp_gathered(Warp& warp);

// Accesses to shared memory by a thread.
void thread_reads(Thread& thread, uint32_t address, uint32_t bytes);
void thread_writes(Thread& thread, uint32_t address, uint32_t bytes);
// 16 bytes by a tensor core; `clock` is what was known when its instruction was issued.
void tensor_core_reads(Cta& cta, uint16_t agent, uint32_t epoch, const Clock& clock, Place place, uint32_t address);
// The destination of a copy, by its agent.
void copy_writes(Thread& issuer, const Copy& copy);

// Accesses to global memory that can be written.
void thread_reads_global(Thread& thread, const Region& region, uintptr_t offset, uint32_t bytes);
void thread_writes_global(Thread& thread, const Region& region, uintptr_t offset, uint32_t bytes);
// The source of a copy that the thread asks for.
void copy_reads_global(Thread& thread, const Region& region, uintptr_t offset, uint32_t bytes);

// Two writes of the same value do no harm (CTAs beyond the last whole group store empty items once more): whether the
// thread's last writes over those of others, nothing between them, changed a word.
void check_rewrites(Thread& thread);

// Release and acquire at a word of global memory.
void release_global(Thread& thread, const void* address);
void acquire_global(Thread& thread, const void* address);


// Before a launch.
void forget_accesses();

}  // namespace emulator

#endif  // EMULATOR_RACES_H_
