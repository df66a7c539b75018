// 16-bit elements as float, and the A fragment that mma and wgmma share.
#ifndef EMULATOR_ELEMENTS_H_
#define EMULATOR_ELEMENTS_H_

#include <stdint.h>
#include <string.h>

#include "interface.h"

namespace emulator {

template <Element kElement>
float element_to_float(uint16_t bits) {
  if constexpr (kElement == Element::kBfloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  } else {
    const uint32_t magnitude = uint32_t(bits & 0x7FFF) << 13, special = 0x7F800000 | magnitude;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;  // the difference of the exponents' offsets; exact
    uint32_t wide;
    memcpy(&wide, &value, 4);
    wide = ((bits & 0x7C00) == 0x7C00 ? special : wide) | uint32_t(bits & 0x8000) << 16;
    memcpy(&value, &wide, 4);
    return value;
  }
}

inline float to_float(Element element, uint16_t bits) {
  return element == Element::kBfloat16 ? element_to_float<Element::kBfloat16>(bits)
                                       : element_to_float<Element::kFloat16>(bits);
}

// Lane 4 g + c of A[16, 16] holds rows g (registers 0 and 2) and g + 8 (1 and 3), k 2 c, 2 c + 1 and, from register 2 on,
// these plus 8.
inline void fill_a_rows(Element element, float (&a)[16][16], int lane, const uint32_t* registers) {
  const int g = lane / 4, c = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) {
    float* pair = a[g + 8 * (i & 1)] + c + 8 * (i / 2);
    pair[0] = to_float(element, registers[i]);
    pair[1] = to_float(element, registers[i] >> 16);
  }
}

}  // namespace emulator

#endif  // EMULATOR_ELEMENTS_H_
