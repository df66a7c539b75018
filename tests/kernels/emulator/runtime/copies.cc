// The copy engine (PTX ISA: cp.async.bulk, cp.async.bulk.tensor, "Swizzling Modes"; driver API: cuTensorMapEncodeTiled).
// A copy fills its destination with NaN when it is issued and writes it at some later time.
#include <string.h>

#include <algorithm>

#include "races.h"

namespace emulator {
namespace {

constexpr int kRowBytes = 128;  // of a box: 64 elements

void issue(Thread& thread, Copy copy) {
  Cta& cta = *thread.cta;
  copy.cta = &cta;
  copy.asker = &cta;
  copy.thread = thread.index;
  shared_at(cta, copy.destination, copy.bytes, copy.source ? 16 : 128);
  ask_for_copy(thread, cta, copy.barrier, copy.bytes);
  for (const Copy& other : machine.copies) {
    if (other.cta == &cta && copy.destination < other.destination + other.bytes &&
        other.destination < copy.destination + copy.bytes) {
      fail("%u bytes to 0x%x: a copy to the same place is still in flight, from line %d", copy.bytes, copy.destination,
           other.place.line);
    }
  }
  touched_by_async_proxy(cta, copy.destination, copy.bytes);
  memset(cta.shared + (copy.destination - machine.shared_base), 0xFF, copy.bytes);
  copy.agent = take_copy_agent(cta);
  copy.epoch = ++cta.copy_epochs[copy.agent];
  copy_writes(thread, copy);
  auto clock = std::make_shared<Clock>();
  release(thread, *clock);
  copy.clock = clock;
  machine.copies.push_back(copy);
}

// 16-byte units of a 128-byte row change places with bits 7 to 9 of the address: units of 8 rows are in 8 banks.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

void execute_box(const Copy& copy) {
  const TensorMap& map = copy.map;
  uint32_t row = copy.destination;
  for (uint32_t j = 0; j < map.box[1]; ++j, row += kRowBytes) {
    const int64_t x = copy.at[0], y = int64_t(copy.at[1]) + j, z = copy.at[2];
    for (int unit = 0; unit < kRowBytes / 16; ++unit) {
      char* to = copy.cta->shared + (swizzled(row + 16 * unit) - machine.shared_base);
      if (y >= 0 && y < int64_t(map.size[1])) {
        memcpy(to, reinterpret_cast<const char*>(map.base + z * map.stride[1] + y * map.stride[0] + 2 * x + 16 * unit), 16);
      } else {
        memset(to, 0, 16);
      }
    }
  }
}

}  // namespace

void tensor_copy(uint32_t destination, const void* map_pointer, uint32_t barrier, int x, int y, int z, Place place) {
  Thread& thread = enter("tensor_copy", place);
  const auto& map = *static_cast<const TensorMap*>(map_pointer);
  if (map.valid != 1) fail("the tensor map was never encoded");
  // The hardware gives zeros outside of the tensor. Query rows rely on that; a page or column there is a wrong index.
  if (z < 0 || uint64_t(z) >= map.size[2] || x < 0 || uint64_t(x) + map.box[0] > map.size[0] || y < 0) {
    fail("box at (%d, %d, %d) lies outside of the tensor [%lld, %lld, %lld]", x, y, z, static_cast<long long>(map.size[0]),
         static_cast<long long>(map.size[1]), static_cast<long long>(map.size[2]));
  }
  for (uint32_t j = 0; j < map.box[1] && y + j < map.size[1]; ++j) {
    const uint64_t row = map.base + z * map.stride[1] + (y + j) * map.stride[0] + 2 * x;
    check_global(reinterpret_cast<const void*>(row), kRowBytes, 16, false);
  }
  Copy copy = {};
  copy.destination = destination;
  copy.bytes = map.box[1] * kRowBytes;
  copy.barrier = barrier;
  copy.map = map;
  copy.at[0] = x, copy.at[1] = y, copy.at[2] = z;
  copy.place = place;
  issue(thread, copy);
}

void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, Place place) {
  Thread& thread = enter("bulk_copy", place);
  if (bytes == 0 || bytes % 16 != 0) fail("%u bytes: a bulk copy takes multiples of 16", bytes);
  const Region& region = check_global(source, bytes, 16, false);
  if (region.writable) copy_reads_global(thread, region, reinterpret_cast<uintptr_t>(source) - region.begin, bytes);
  Copy copy = {};
  copy.destination = destination;
  copy.bytes = bytes;
  copy.barrier = barrier;
  copy.source = static_cast<const char*>(source);
  copy.place = place;
  issue(thread, copy);
}

void execute_copy(size_t index) {
  const Copy copy = machine.copies[index];
  machine.copies[index] = machine.copies.back();
  machine.copies.pop_back();
  const Blame blame = {copy.asker, copy.thread, "a copy", copy.place};
  machine.blame = &blame;
  if (copy.remote || copy.source != nullptr) {
    memcpy(copy.cta->shared + (copy.destination - machine.shared_base), copy.remote ? copy.stored : copy.source, copy.bytes);
  } else {
    execute_box(copy);
  }
  if (!copy.remote) copy.cta->free_copy_agents.push_back(copy.agent);
  complete_copy(copy);
  machine.blame = nullptr;
}

bool encode_tensor_map(TensorMap& map, uint32_t rank, const void* base, const uint64_t* size, const uint64_t* stride,
                       const uint32_t* box, const uint32_t* step) {
  bool valid = rank == 3 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 == kRowBytes && box[2] == 1;
  for (unsigned i = 0; i < 3 && valid; ++i) {
    valid = size[i] >= 1 && size[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && step[i] == 1;
  }
  for (unsigned i = 0; i < 2 && valid; ++i) valid = stride[i] % 16 == 0 && stride[i] < uint64_t(1) << 40;
  if (!valid) return false;
  map = {reinterpret_cast<uint64_t>(base), {size[0], size[1], size[2]}, {stride[0], stride[1]}, {box[0], box[1], box[2]}, 1};
  return true;
}

}  // namespace emulator
