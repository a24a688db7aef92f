// Stochastic rounding to 16 bits: to one of the two nearest numbers, the more often the nearer it is, so that
// the mean is the number itself. Updates far below a number's last place then arrive on average, where
// rounding to nearest would lose every one of them.
#pragma once
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

// Every bit depends on every bit: SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014).
inline uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// Random bits of a row's columns: a function of the table's key, the row and the column, and so the same in
// whatever order, by however many threads and of whatever width rows are updated.
struct Noise {
  Int first = broadcast_int(0), second = broadcast_int(0);
  Noise() = default;
  Noise(uint64_t key, int64_t row) {
    static constexpr uint32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint64_t of_row = mixed(key + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15);
    first = broadcast_int(static_cast<uint32_t>(of_row)) + load(lanes);
    second = broadcast_int(static_cast<uint32_t>(of_row >> 32));
  }
  // Of the columns from `column` on; the upper bits of each lane are the good ones. The steps are those of
  // Wellons' lowbias32 (2018), with the second half of the row's number between them.
  Int at(int64_t column) const {
    Int x = first + broadcast_int(static_cast<uint32_t>(column));
    x = (x ^ x >> 16) * broadcast_int(0x7FEB352D);
    return ((x ^ x >> 15) + second) * broadcast_int(0x846CA68B);
  }
};

// The bits of a number's magnitude that go: all of `mask`, but none of a NaN, which is to stay one.
inline Int dropped(Int magnitude, uint32_t mask) {
  const Int none = shift_right_signed(broadcast_int(0x7F800000) - magnitude, 31);
  return broadcast_int(mask) ^ (broadcast_int(mask) & none);
}
// x with those bits rounded away by as many random ones. What rounds up past the last finite number becomes
// infinite: the exponent is one more.
inline Int drop(Int x, Int random, Int low) {
  const Int sum = x + (random & low);
  return sum ^ (sum & low);
}

// A register of numbers that T has, from one of any.
inline Vec rounded(Vec x, Int random, BFloat) {
  return from_bits(drop(bits(x), random >> 16, dropped(bits(x) & broadcast_int(0x7FFFFFFF), 0xFFFF)));
}
inline Vec rounded(Vec x, Int random, Half) {
  const Int sign = bits(x) & broadcast_int(0x80000000), size = bits(x) ^ sign;
  // Below 2^-14 float16's last place stays 2^-24: what it is for the float32 numbers from 2^-14 to 2^-13.
  const Int least = broadcast_int(0x38800000), below = shift_right_signed(size - least, 31) & least;
  const Int raised = bits(from_bits(size) + from_bits(below));
  const Vec result = from_bits(drop(raised, random >> 19, dropped(size, 0x1FFF))) - from_bits(below);
  return from_bits(bits(result) ^ sign);
}

}  // namespace mprec::MPREC_ISA
