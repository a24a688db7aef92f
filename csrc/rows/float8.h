// dim bytes of float8 (e4m3: 1 sign, 4 exponent and 3 mantissa bits, no infinity), then a scale as float32.
#pragma once
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

struct Float8Row {
  static constexpr bool quantised = true, biased = false, paired = false;
  static constexpr int bits = 8, code = 43;
  static constexpr int64_t bytes(int64_t dim) { return dim + 4; }
  static constexpr int64_t dim(int64_t bytes) { return bytes - 4; }
  const uint8_t* values;
  float scale;
  Float8Row(const char* row, int64_t dim) : values(reinterpret_cast<const uint8_t*>(row)) {
    __builtin_memcpy(&scale, row + dim, 4);
  }
  Vec at(int64_t column) const { return decode(load_bytes(values + column)); }
  Vec at(int64_t column, Mask mask) const { return decode(load_bytes(values + column, mask)); }

 private:
  // With the exponent's bias put right, x is the value where that is normal. Below, at x < 2^-6, it is
  // 2x - 2^-6; that is the lesser of the two just there. The one code that is no number, 0x7f, gets the
  // exponent that float32 has for it.
  static Vec decode(Int byte) {
    const Int size = byte & broadcast_int(0x7f), none = (size + broadcast_int(1)) & broadcast_int(0x80);
    const Vec x = from_bits((size << 20) + broadcast_int(120u << 23) + (none << 23) - (none << 19));
    const Vec value = lesser(x, fma(broadcast(2.0f), x, broadcast(-0x1p-6f)));
    return from_bits(bits_of(value) ^ (byte & broadcast_int(0x80)) << 24);
  }
  static Int bits_of(Vec a) { return mprec::MPREC_ISA::bits(a); }  // not the constant above
};

}  // namespace mprec::MPREC_ISA
