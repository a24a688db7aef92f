// dim bytes, then scale and bias as float32 (FBGEMM's fused 8-bit row).
#pragma once
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

struct Int8Row {
  static constexpr bool quantised = true, biased = true, paired = false;
  static constexpr int bits = 8, code = 8;
  static constexpr int64_t bytes(int64_t dim) { return dim + 8; }
  static constexpr int64_t dim(int64_t bytes) { return bytes - 8; }
  const uint8_t* values;
  float scale, bias;
  Int8Row(const char* row, int64_t dim) : values(reinterpret_cast<const uint8_t*>(row)) {
    __builtin_memcpy(&scale, row + dim, 4);
    __builtin_memcpy(&bias, row + dim + 4, 4);
  }
  Vec at(int64_t column) const { return to_float(load_bytes(values + column)); }
  // The 8 bytes of scale and bias follow.
  Vec at(int64_t column, Mask mask) const { return to_float(load_bytes_past(values + column, mask)); }
};

}  // namespace mprec::MPREC_ISA
