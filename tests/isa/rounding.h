// Rounding to 16 bits and its noise, from their definitions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float16.h"
#include "rows/formats.h"

namespace mprec::test {

// Stochastically: up by a last place if the part of one that is lost and as
// many random bits make one together. In float64, which holds all of this.
struct Type16 {
  Format format;
  int lost, least;  // bits of a float32 that are lost; the exponent of the smallest last place

  double value(uint16_t bits) const {
    if (format == Format::f16) {
      Float16 x;
      std::memcpy(&x, &bits, sizeof bits);
      return static_cast<double>(static_cast<float>(x));
    }
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  double rounded(float x, uint32_t random) const {
    if (!std::isfinite(x) || x == 0) return x;
    const double size = std::fabs(double{x});
    const int place = std::max(std::ilogb(size) - (23 - lost), least);
    const double parts = std::ldexp(size, lost - place);  // of 2^lost that make a last place
    const double whole = std::floor(std::ldexp(std::nearbyint(parts) + (random >> (32 - lost)), -lost));
    const double result = std::ldexp(whole, place), end = format == Format::f16 ? 0x1p16 : 0x1p128;
    return std::copysign(result >= end ? std::numeric_limits<double>::infinity() : result, x);
  }
  // Ties to even.
  double nearest(float x) const {
    if (!std::isfinite(x) || x == 0) return x;
    const int place = std::max(std::ilogb(double{x}) - (23 - lost), least);
    const double result = std::ldexp(std::nearbyint(std::ldexp(double{x}, -place)), place);
    const double end = format == Format::f16 ? 0x1p16 : 0x1p128;
    return std::fabs(result) >= end ? std::copysign(std::numeric_limits<double>::infinity(), x) : result;
  }
};
inline constexpr Type16 types16[] = {{Format::f16, 13, -24}, {Format::bf16, 16, -133}};

inline uint32_t noise(uint64_t key, int64_t row, int64_t column) {
  uint64_t z = key + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  uint32_t x = static_cast<uint32_t>(z) + static_cast<uint32_t>(column);
  x = (x ^ x >> 16) * 0x7FEB352Du;
  return ((x ^ x >> 15) + static_cast<uint32_t>(z >> 32)) * 0x846CA68Bu;
}

}  // namespace mprec::test
