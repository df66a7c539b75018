// Shared and global memory. Every access of the kernels comes here: wrapped ones from device/, plain ones from
// sanitizer.cc.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "races.h"

// Where dynamic shared memory begins for kernels that declare it `extern __shared__` so. The memory of the CTA that runs is
// mapped there.
namespace mla_hopper {
alignas(4096) char dynamic_smem[emulator::kSharedStride];
alignas(4096) char aligned_smem[emulator::kSharedStride];  // declared with an alignment of 1024
}  // namespace mla_hopper

extern "C" const char __ehdr_start;
extern "C" char _end;

namespace emulator {
namespace {

int shared_file = -1;

uintptr_t offset_in(const char* window, const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(window);
}

}  // namespace

char* shared_memory_of(unsigned cta) {
  static char* all = nullptr;
  static size_t count = 0;
  if (shared_file < 0) shared_file = memfd_create("shared memory", 0);
  if (cta >= count) {
    if (all != nullptr) munmap(all, count * kSharedStride);
    count = std::max<size_t>(cta + 1, 64);
    void* memory = MAP_FAILED;
    if (ftruncate(shared_file, count * kSharedStride) == 0) {
      memory = mmap(nullptr, count * kSharedStride, PROT_READ | PROT_WRITE, MAP_SHARED, shared_file, 0);
    }
    if (memory == MAP_FAILED) {
      perror("emulator: no memory for shared memory");
      abort();
    }
    all = static_cast<char*>(memory);
  }
  return all + cta * kSharedStride;
}

void map_shared(Cta& cta) {
  if (machine.mapped == &cta) return;
  machine.mapped = &cta;
  if (machine.window == nullptr) return;
  void* memory = mmap(machine.window, kSharedStride, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, shared_file,
                      cta.index * kSharedStride);
  if (memory == MAP_FAILED) {
    perror("emulator: shared memory cannot be mapped");
    abort();
  }
}

uint32_t shared_address(const void* pointer, Place place) {
  Thread& thread = enter("shared_address", place);
  if (machine.window == nullptr) {
    const bool aligned = offset_in(mla_hopper::aligned_smem, pointer) < kSharedStride;
    machine.window = aligned ? mla_hopper::aligned_smem : mla_hopper::dynamic_smem;
    machine.shared_base = 1024 + (aligned ? 0 : 16 * (machine.random() % 64));
    machine.mapped = nullptr;
    map_shared(*thread.cta);
  }
  const uintptr_t offset = offset_in(machine.window, pointer);
  if (offset >= machine.launch.shared_bytes) fail("%p is not in shared memory", pointer);
  return machine.shared_base + offset;
}

void* shared_at(Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment) {
  if (address % alignment != 0) fail("shared address 0x%x is not aligned to %u bytes", address, alignment);
  const uint32_t offset = address - machine.shared_base;
  if (address < machine.shared_base || offset + bytes > machine.launch.shared_bytes) {
    fail("%u bytes at shared address 0x%x: the CTA has 0x%x to 0x%x", bytes, address, machine.shared_base,
         machine.shared_base + machine.launch.shared_bytes - 1);
  }
  return cta.shared + offset;
}

// PTX ISA, "Async proxy": what ordinary stores wrote is there for tensor cores and copy engine after the writing
// thread's fence.proxy.async.
void wrote_shared(Thread& thread, uint32_t address, uint32_t bytes) {
  thread_writes(thread, address, bytes);
  uint16_t* words = thread.cta->unfenced.data();
  const uint32_t first = (address - machine.shared_base) / 4, last = (address - machine.shared_base + bytes - 1) / 4;
  for (uint32_t word = first; word <= last; ++word) {
    if (words[word] == thread.index + 1) continue;
    words[word] = thread.index + 1;
    thread.unfenced.push_back(word);
  }
}

void fence_async_proxy(Place place) {
  if (dropped("fence_async_proxy", place)) return;
  Thread& thread = enter("fence_async_proxy", place);
  for (const uint32_t word : thread.unfenced) {
    if (thread.cta->unfenced[word] == thread.index + 1) thread.cta->unfenced[word] = 0;
  }
  thread.unfenced.clear();
}

void fence_async_proxy_global(Place place) {
  if (dropped("fence_async_proxy_global", place)) return;
  Thread& thread = enter("fence_async_proxy_global", place);
  thread.announced = thread.clock;
}

void touched_by_async_proxy(Cta& cta, uint32_t address, uint32_t bytes) {
  const uint32_t first = (address - machine.shared_base) / 4;
  for (uint32_t word = first; word < first + bytes / 4; ++word) {
    if (cta.unfenced[word] != 0) {
      fail("tensor cores or copy engine touch shared address 0x%x, which thread %d wrote without fence.proxy.async since",
           machine.shared_base + 4 * word, cta.unfenced[word] - 1);
    }
  }
}

const Region& check_global(const void* pointer, uint64_t bytes, uint32_t alignment, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  const char* verb = write ? "writes" : "reads";
  const Region* nearest = nullptr;  // before it
  for (const Region& region : machine.options.regions) {
    if (at < region.begin) continue;
    const unsigned long long offset = at - region.begin;
    if (offset + bytes <= region.bytes) {
      if (at % alignment != 0) fail("%s + %llu is not aligned to %u bytes", region.name.c_str(), offset, alignment);
      if (write && !region.writable) fail("writes to %s + %llu", region.name.c_str(), offset);
      return region;
    }
    if (nearest == nullptr || region.begin > nearest->begin) nearest = &region;
  }
  const unsigned long long count = bytes;
  if (nearest == nullptr) fail("%s %llu bytes at %p, before every tensor", verb, count, pointer);
  fail("%s %llu bytes at %s + %llu, which has %llu bytes", verb, count, nearest->name.c_str(),
       static_cast<unsigned long long>(at - nearest->begin), static_cast<unsigned long long>(nearest->bytes));
}

void plain_access(const void* pointer, uint32_t bytes, bool write) {
  Thread* thread = machine.current;
  if (thread == nullptr) return;  // host code
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  if (at - reinterpret_cast<uintptr_t>(thread->fiber.stack) < kStackBytes) return;
  const uintptr_t offset = offset_in(machine.window, pointer);
  if (machine.window != nullptr && offset < kSharedStride) {
    const uint32_t address = machine.shared_base + offset;
    shared_at(*thread->cta, address, bytes, bytes);
    write ? wrote_shared(*thread, address, bytes) : thread_reads(*thread, address, bytes);
    return;
  }
  if (!write && at - machine.host_stack < 65536) return;  // a kernel's parameters
  if (!write && at - reinterpret_cast<uintptr_t>(&__ehdr_start) < uintptr_t(&_end - &__ehdr_start)) return;  // constants
  const Region& region = check_global(pointer, bytes, bytes, write);
  if (!region.writable) return;
  write ? thread_writes_global(*thread, region, at - region.begin, bytes)
        : thread_reads_global(*thread, region, at - region.begin, bytes);
}

void load_shared(void* destination, uint32_t address, uint32_t bytes, Place place) {
  Thread& thread = enter("load_shared", place);
  memcpy(destination, shared_at(*thread.cta, address, bytes, bytes), bytes);
  thread_reads(thread, address, bytes);
}

void store_shared(uint32_t address, const void* source, uint32_t bytes, Place place) {
  Thread& thread = enter("store_shared", place);
  memcpy(shared_at(*thread.cta, address, bytes, bytes), source, bytes);
  wrote_shared(thread, address, bytes);
}

// A thread that would read the same again waits until there is something else to read: a spinning loop needs no turns.
uint32_t load_acquire(const uint32_t* address, Place place) {
  Thread& thread = enter("load_acquire", place);
  check_global(address, 4, 4, false);
  if (thread.polled == address && *address == thread.polled_value) {
    wait_until(*thread.warp, 1u << thread.lane(), [&thread] { return *thread.polled != thread.polled_value; });
    park();
  }
  acquire_global(thread, address);
  thread.polled = address;
  return thread.polled_value = *address;
}

uint32_t atomic_add(uint32_t* address, uint32_t value, bool acquire, bool release, Place place) {
  Thread& thread = enter(acquire ? "add_ordered" : release ? "add_release" : "atomicAdd", place);
  check_global(address, 4, 4, true);
  const uint32_t before = *address;
  *address += value;
  if (acquire) acquire_global(thread, address);
  if (release) release_global(thread, address);
  return before;
}

void atomic_increment(uint32_t* address, uint32_t most, Place place) {
  enter("add_cyclic", place);
  check_global(address, 4, 4, true);
  *address = *address >= most ? 0 : *address + 1;
}

}  // namespace emulator
