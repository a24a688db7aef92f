// float16 and bfloat16 in memory. Included by the header of each ISA, after its MPREC_ISA.
#pragma once
#include <cstdint>

namespace mprec::MPREC_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace mprec::MPREC_ISA
