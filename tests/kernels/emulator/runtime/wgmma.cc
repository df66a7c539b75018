// Warpgroup matrix instructions (PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions"). Each warp computes its 16 of
// the 64 rows by itself, at some time between the instruction and the wait that covers it; until that wait its
// accumulators hold NaN.
#include <string.h>

#include <algorithm>

#include "elements.h"
#include "races.h"

namespace emulator {
namespace {

constexpr uint32_t kInFlight = 0x7FB1F1F1;  // a signalling NaN: arithmetic does not leave it as it is

// A 128-byte-swizzled matrix: 8 rows of 128 bytes lie together ("Matrix Descriptor Format", "Strides").
struct Descriptor {
  uint32_t address, leading, stride;
  explicit Descriptor(uint64_t bits)
      : address((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) fail("descriptor 0x%llx has no 128-byte swizzle", static_cast<unsigned long long>(bits));
    if (bits >> 49 & 7) fail("descriptor 0x%llx has a base offset", static_cast<unsigned long long>(bits));
  }
};

// 16 bytes, 8 elements, of a swizzled matrix.
const uint16_t* unit(Warp& warp, const PendingProduct& pending, uint32_t address) {
  Cta& cta = *warp.cta;
  address ^= address >> 3 & 0x70;
  const void* pointer = shared_at(cta, address, 16, 16);
  tensor_core_reads(cta, tensor_core(warp), pending.epoch, *pending.clock, pending.place, address);
  touched_by_async_proxy(cta, address, 16);
  return static_cast<const uint16_t*>(pointer);
}

template <Element kElement>
void load_k_major(Warp& warp, const PendingProduct& pending, const Descriptor& matrix, uint32_t row, float (&k)[16]) {
  for (int half = 0; half < 2; ++half) {
    const uint16_t* elements = unit(warp, pending, matrix.address + row / 8 * matrix.stride + row % 8 * 128 + 16 * half);
    for (int i = 0; i < 8; ++i) k[8 * half + i] = element_to_float<kElement>(elements[i]);
  }
}

template <Element kElement, int kColumns>
void multiply(Warp& warp, const PendingProduct& pending) {
  const WarpgroupProduct& product = pending.product;
  float a[16][16];
  if (product.a_registers != nullptr) {
    for (int lane = 0; lane < 32; ++lane) fill_a_rows(kElement, a, lane, pending.a_registers[lane]);
  } else {
    const Descriptor matrix(product.a);
    for (int row = 0; row < 16; ++row) load_k_major<kElement>(warp, pending, matrix, 16 * (warp.index & 3) + row, a[row]);
  }
  float b[16][kColumns];
  const Descriptor matrix(product.b);
  for (int i = 0; i < kColumns; i += product.b_mn_major ? 8 : 1) {
    if (!product.b_mn_major) {
      float column[16];
      load_k_major<kElement>(warp, pending, matrix, i, column);
      for (int k = 0; k < 16; ++k) b[k][i] = column[k];
      continue;
    }
    for (int k = 0; k < 16; ++k) {
      const uint32_t row = matrix.address + i / 64 * matrix.leading + k / 8 * matrix.stride + k % 8 * 128;
      const uint16_t* elements = unit(warp, pending, row + i % 64 * 2);
      for (int j = 0; j < 8; ++j) b[k][i + j] = element_to_float<kElement>(elements[j]);
    }
  }
  float* d = pending.target->value.data();
  if (!product.accumulate) std::fill_n(d, 16 * kColumns, 0.f);
  for (int row = 0; row < 16; ++row, d += kColumns) {
    float sum[kColumns];
    memcpy(sum, d, sizeof sum);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < kColumns; ++n) sum[n] += a[row][k] * b[k][n];
    }
    memcpy(d, sum, sizeof sum);
  }
}

// Calls `each` with every register of the accumulators and its element of the tile.
template <typename Each>
void for_registers(Accumulators& accumulators, Each each) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < accumulators.columns / 2; ++i) {
      const int row = lane / 4 + 8 * (i / 2 & 1), column = i / 4 * 8 + 2 * (lane % 4) + (i & 1);
      each(accumulators.registers[lane][i], accumulators.value[row * accumulators.columns + column]);
    }
  }
}

std::shared_ptr<Accumulators> in_flight(const Warp& warp, const float* registers) {
  for (const PendingProduct& pending : warp.products) {
    if (pending.target->registers[0] == registers) return pending.target;
  }
  return nullptr;
}

// What the lanes know together; computed again only when that has changed.
std::shared_ptr<const Clock> known(Warp& warp) {
  uint64_t state = 0;  // grows with every change
  for (const Thread* thread : warp.threads) state += thread->acquired + thread->clock.own[thread->index];
  if (warp.known_as_of != state) {
    auto clock = std::make_shared<Clock>();
    for (const Thread* thread : warp.threads) clock->join_with(thread->clock);
    warp.known = clock;
    warp.known_as_of = state;
  }
  return warp.known;
}

bool issue(Warp& warp, void* const* arguments) {
  const auto& first = *static_cast<const WarpgroupProduct*>(arguments[0]);
  PendingProduct pending = {first,       {},    in_flight(warp, first.accumulators), warp.open_group, ++warp.product_epoch,
                            known(warp), false, warp.collective_place};
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<const WarpgroupProduct*>(arguments[lane]);
    if (other.a != first.a || other.b != first.b || other.accumulate != first.accumulate) {
      fail("lanes of a warp give different descriptors or accumulate predicates");
    }
  }
  if (pending.target == nullptr) {
    if (!warp.fenced) fail("wgmma uses registers that may have been written since the last wgmma.fence");
    auto target = std::make_shared<Accumulators>();
    target->columns = first.columns;
    target->value.resize(16 * first.columns);
    for (int lane = 0; lane < 32; ++lane) {
      target->registers[lane] = static_cast<const WarpgroupProduct*>(arguments[lane])->accumulators;
    }
    for_registers(*target, [](float& value, float& element) {
      element = value;
      memcpy(&value, &kInFlight, 4);
    });
    pending.target = target;
  }
  for (int lane = 0; lane < 32; ++lane) {
    pending.a_registers[lane] = static_cast<const WarpgroupProduct*>(arguments[lane])->a_registers;
  }
  ++warp.products_issued;
  warp.products.push_back(std::move(pending));
  return true;
}

void execute(Warp& warp, PendingProduct& pending) {
  const Blame blame = {warp.cta, 32 * warp.index, "wgmma", pending.place};
  machine.blame = &blame;
  const bool wide = pending.product.columns == 128;
  if (pending.product.element == Element::kBfloat16) {
    wide ? multiply<Element::kBfloat16, 128>(warp, pending) : multiply<Element::kBfloat16, 64>(warp, pending);
  } else {
    wide ? multiply<Element::kFloat16, 128>(warp, pending) : multiply<Element::kFloat16, 64>(warp, pending);
  }
  machine.blame = nullptr;
  pending.executed = true;
}

bool commit(Warp& warp, void* const*) {
  ++warp.open_group;
  return true;
}

bool fence(Warp& warp, void* const*) {
  warp.fenced = true;
  return true;
}

bool wait(Warp& warp, void* const* arguments) {
  const uint64_t allowed = *static_cast<const int*>(arguments[0]);
  while (!warp.products.empty() && warp.products.front().group + allowed < warp.open_group) {
    PendingProduct done = warp.products.front();
    if (!done.executed) execute(warp, done);
    warp.products.pop_front();
    for (Thread* thread : warp.threads) thread->clock.own[tensor_core(warp)] = done.epoch;
    if (in_flight(warp, done.target->registers[0]) != nullptr) continue;
    for_registers(*done.target, [](float& value, float& element) {
      if (memcmp(&value, &kInFlight, 4) != 0) fail("an accumulator was written while wgmma was adding to it");
      value = element;
    });
    warp.fenced = false;
  }
  return true;
}

}  // namespace

bool products_waiting(const Warp& warp) { return !warp.products.empty() && !warp.products.back().executed; }

void execute_product(Warp& warp) {
  for (PendingProduct& pending : warp.products) {
    if (pending.executed) continue;
    execute(warp, pending);
    return;
  }
}

void wgmma(const WarpgroupProduct& product, Place place) {
  WarpgroupProduct argument = product;
  collective("wgmma", place, &argument, issue);
}

void wgmma_fence(Place place) {
  if (!dropped("wgmma_fence", place)) collective("wgmma_fence", place, nullptr, fence);
}

void wgmma_commit(Place place) {
  if (!dropped("wgmma_commit", place)) collective("wgmma_commit", place, nullptr, commit);
}

void wgmma_wait(int pending, Place place) {
  if (!dropped("wgmma_wait", place)) collective("wgmma_wait", place, &pending, wait);
}

}  // namespace emulator
