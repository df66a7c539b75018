#include "fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

namespace emulator {

char* fiber_stacks(size_t count) {
  static char* stacks = nullptr;
  static size_t bytes = 0;
  const size_t needed = count * kStackBytes;
  if (needed > bytes) {
    if (stacks != nullptr) munmap(stacks, bytes);
    void* memory = mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      perror("emulator: no memory for stacks");
      abort();
    }
    stacks = static_cast<char*>(memory);
    bytes = needed;
  }
  return stacks;
}

#ifdef __x86_64__

// The registers that a called function must keep (System V ABI) go to the old stack and come from the new one.
asm(R"(
.text
.p2align 4
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** from, void* to);

void start_fiber(Fiber& fiber, char* stack, void (*entry)()) {
  fiber.stack = stack;
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top -= 2;  // a call leaves the stack 8 bytes off a multiple of 16
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  fiber.stack_pointer = top - 6;
}

void switch_fiber(Fiber& from, Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

#else

void start_fiber(Fiber& fiber, char* stack, void (*entry)()) {
  fiber.stack = stack;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace emulator
