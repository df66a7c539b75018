// The calls that the compiler inserts before each access to memory other than a variable it sees through
// (-fsanitize=thread), and where a pointer is not aligned to its type (-fsanitize=alignment). This stands for the
// sanitizers' own libraries.
#include "machine.h"

#define EMULATOR_ACCESSES(bytes)                                                                       \
  void __tsan_read##bytes(void* pointer) { emulator::plain_access(pointer, bytes, false); }            \
  void __tsan_write##bytes(void* pointer) { emulator::plain_access(pointer, bytes, true); }            \
  void __tsan_unaligned_read##bytes(void* pointer) { emulator::plain_access(pointer, bytes, false); }  \
  void __tsan_unaligned_write##bytes(void* pointer) { emulator::plain_access(pointer, bytes, true); }
extern "C" {
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
void __tsan_init() {}
char __tsan_atomic8_load(const volatile char* pointer, int) { return __atomic_load_n(pointer, __ATOMIC_ACQUIRE); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* pointer, size_t bytes) { emulator::plain_access(pointer, bytes, false); }
void __tsan_write_range(void* pointer, size_t bytes) { emulator::plain_access(pointer, bytes, true); }

// -fsanitize=alignment: called when a pointer is not aligned to its type.
struct UbsanTypeMismatch {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(UbsanTypeMismatch* data, void* pointer) {
  if (emulator::machine.current == nullptr) return;
  emulator::machine.current->doing = "a plain access";
  emulator::machine.current->place = {data->file, static_cast<int>(data->line)};
  emulator::fail("%p is not aligned to its type", pointer);
}
}
