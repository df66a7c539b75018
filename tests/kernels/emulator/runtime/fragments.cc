// Warp-level matrix instructions (PTX ISA: ldmatrix, stmatrix, mma.sync.m16n8k16). Lane 4 g + c of a warp holds rows or
// columns g and elements 2 c, 2 c + 1 of an 8 x 8 matrix.
#include <string.h>

#include "elements.h"
#include "races.h"

namespace emulator {
namespace {

struct MatricesArgument {
  uint32_t* fragment;
  uint32_t address;
  bool transposed;
};

// Lane 8 m + r gives the address of row r of matrix m; register m of a lane has its two elements of matrix m.
bool load(Warp& warp, void* const* arguments) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = *static_cast<MatricesArgument*>(arguments[lane]);
    memcpy(matrix[lane / 8][lane % 8], shared_at(*warp.cta, argument.address, 16, 16), 16);
    thread_reads(*warp.threads[lane], argument.address, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = *static_cast<MatricesArgument*>(arguments[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m) {
      const uint16_t low = argument.transposed ? matrix[m][c][g] : matrix[m][g][c];
      const uint16_t high = argument.transposed ? matrix[m][c + 1][g] : matrix[m][g][c + 1];
      argument.fragment[m] = low | uint32_t(high) << 16;
    }
  }
  return true;
}

bool store(Warp& warp, void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = *static_cast<MatricesArgument*>(arguments[lane]);
    auto* row = static_cast<uint32_t*>(shared_at(*warp.cta, argument.address, 16, 16));
    for (int c = 0; c < 4; ++c) row[c] = static_cast<MatricesArgument*>(arguments[lane % 8 * 4 + c])->fragment[lane / 8];
    wrote_shared(*warp.threads[lane], argument.address, 16);
  }
  return true;
}

struct ProductArgument {
  Element element;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

bool multiply(Warp&, void* const* arguments) {
  const Element element = static_cast<ProductArgument*>(arguments[0])->element;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = *static_cast<ProductArgument*>(arguments[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    fill_a_rows(element, a, lane, argument.a);
    for (int i = 0; i < 2; ++i) {
      b[8 * i + c][g] = to_float(element, argument.b[i]);
      b[8 * i + c + 1][g] = to_float(element, argument.b[i] >> 16);
      d[g + 8 * i][c] = argument.d[2 * i];
      d[g + 8 * i][c + 1] = argument.d[2 * i + 1];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[row][n] += a[row][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = *static_cast<ProductArgument*>(arguments[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      argument.d[2 * i] = d[g + 8 * i][c];
      argument.d[2 * i + 1] = d[g + 8 * i][c + 1];
    }
  }
  return true;
}

}  // namespace

void load_matrices(uint32_t (&fragment)[4], uint32_t address, bool transposed, Place place) {
  MatricesArgument argument = {fragment, address, transposed};
  collective("ldmatrix", place, &argument, load);
}

void store_matrices(uint32_t address, const uint32_t (&fragment)[4], Place place) {
  MatricesArgument argument = {const_cast<uint32_t*>(fragment), address, false};
  collective("stmatrix", place, &argument, store);
}

void multiply_fragments(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place) {
  ProductArgument argument = {element, d, a, {b0, b1}};
  collective("mma", place, &argument, multiply);
}

}  // namespace emulator
