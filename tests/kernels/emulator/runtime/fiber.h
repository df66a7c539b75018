// Threads that one operating system thread switches between.
#ifndef EMULATOR_FIBER_H_
#define EMULATOR_FIBER_H_

#include <stddef.h>
#include <stdint.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;  // its lowest byte
};

// Stacks for `count` fibers, kept for later calls.
char* fiber_stacks(size_t count);

// Makes `fiber` begin with `entry`, which must not return.
void start_fiber(Fiber& fiber, char* stack, void (*entry)());

// Goes on with `to`; returns when something switches to `from`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace emulator

#endif  // EMULATOR_FIBER_H_
