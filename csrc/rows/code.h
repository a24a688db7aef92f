// Codes of a table of low rank: int8, of a scale that the projection behind them has in it.
#pragma once
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

struct CodeRow {
  static constexpr bool quantised = false, paired = false;
  static constexpr int bits = 8, code = 0;
  static constexpr int64_t bytes(int64_t dim) { return dim; }
  static constexpr int64_t dim(int64_t columns) { return columns; }
  const uint8_t* values;
  CodeRow(const char* row, int64_t) : values(reinterpret_cast<const uint8_t*>(row)) {}
  Vec at(int64_t column) const { return with_sign(load_bytes(values + column)); }
  Vec at(int64_t column, Mask mask) const { return with_sign(load_bytes(values + column, mask)); }

 private:
  // 128 to 255 stand for 256 less.
  static Vec with_sign(Int bytes) {
    const Vec u = to_float(bytes), above = greater(u - broadcast(127.0f), zero());
    const Vec one_if_above = zero() - greater(zero() - above, broadcast(-1.0f));
    return fma(one_if_above, broadcast(-256.0f), u);
  }
};

}  // namespace mprec::MPREC_ISA
