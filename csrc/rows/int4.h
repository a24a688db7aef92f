// dim / 2 bytes, the even column in the low four bits, then scale and bias as float16 (FBGEMM's fused 4-bit
// row).
#pragma once
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

struct Int4Row {
  static constexpr bool quantised = true, biased = true, paired = true;
  static constexpr int bits = 4, code = 4;
  static constexpr int64_t bytes(int64_t dim) { return dim / 2 + 4; }
  static constexpr int64_t dim(int64_t bytes) { return (bytes - 4) * 2; }
  const uint8_t* values;
  float scale, bias;
  Int4Row(const char* row, int64_t dim) : values(reinterpret_cast<const uint8_t*>(row)) {
    Half pair[2];
    __builtin_memcpy(pair, row + dim / 2, sizeof pair);
    to_floats(pair, scale, bias);
  }
  Vec at(int64_t column) const { return load_nibbles(values, column); }
  // The 4 bytes of scale and bias follow, and 5 bytes or more of a pair.
  Vec at(int64_t column, Mask mask) const { return load_nibbles_past(values, column, mask); }
  Pair pair(int64_t column) const { return load_nibble_pairs(values, column); }
  // `mask`: of the pair's second register.
  Pair pair(int64_t column, Mask mask) const { return load_nibble_pairs_past(values, column, mask); }
};

}  // namespace mprec::MPREC_ISA
