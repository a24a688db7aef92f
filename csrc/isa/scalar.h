// Plain C++: any CPU. The other headers here offer the same names; what each of them does is said here.
#pragma once
#define MPREC_ISA scalar
#include <cstdint>

#include "arch/arch.h"
#include "isa/float16.h"
#include "isa/slots.h"

namespace mprec::MPREC_ISA {

// ---- Floats

// A register of floats.
struct Vec {
  static constexpr int width = 1;
  static constexpr bool free_masks = true;  // a masked load or store costs what a plain one does
  float v;
};
// The first n lanes, 0 <= n <= width: loads zero the others and do not read them, stores leave them alone.
struct Mask {
  bool m;
  explicit Mask(int64_t n) : m(n > 0) {}
};

inline Vec zero() { return {0.0f}; }
inline Vec broadcast(float x) { return {x}; }
inline Vec load(const float* p) { return {*p}; }
inline Vec load(const float* p, Mask k) { return {k.m ? *p : 0.0f}; }
inline void store(float* p, Vec a) { *p = a.v; }
inline void store(float* p, Vec a, Mask k) {
  if (k.m) *p = a.v;
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec sqrt(Vec a) { return {__builtin_sqrtf(a.v)}; }
// a * b + c, rounded once where the ISA can.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// a > b ? a : b in each lane; so b where either is NaN.
inline Vec greater(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec lesser(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline float sum(Vec a) { return a.v; }

// ---- float16 and bfloat16. Stores round to nearest, ties to even

inline float to_float(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponent is re-biased by a multiplication, which handles subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
inline float to_float(BFloat b) { return bits_to_float(static_cast<uint32_t>(b.bits) << 16); }
inline void narrow(float x, BFloat* p) {
  const uint32_t bits = float_to_bits(x);
  p->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half* p) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000;
  const float size = bits_to_float(bits & 0x7fffffff);
  uint32_t out;
  if (x != x) {
    out = 0x7e00 | (bits >> 13 & 0x3ff);
  } else if (size >= 65520.0f) {
    out = 0x7c00;
  } else if (size < 0x1p-14f) {  // subnormal: in units of 2^-24; adding 2^23 rounds to an integer
    out = float_to_bits(size * 0x1p24f + 0x1p23f) & 0x7fffff;
  } else {
    const uint32_t m = bits & 0x7fffffff;
    out = (m + 0xfff + (m >> 13 & 1) - 0x38000000) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | out);
}
template <class T>
Vec load16(const T* p) {
  return {to_float(*p)};
}
template <class T>
Vec load16(const T* p, Mask k) {
  return {k.m ? to_float(*p) : 0.0f};
}
template <class T>
void store16(T* p, Vec a) {
  narrow(a.v, p);
}
template <class T>
void store16(T* p, Vec a, Mask k) {
  if (k.m) narrow(a.v, p);
}
inline void to_floats(const Half (&pair)[2], float& first, float& second) {
  first = to_float(pair[0]);
  second = to_float(pair[1]);
}

// ---- Integers: as many 32-bit lanes as Vec has floats, and as many 64-bit lanes for products

struct Int {
  uint32_t v;
};
struct Wide {
  uint64_t v;
};

inline Int broadcast_int(uint32_t x) { return {x}; }
inline Int load(const uint32_t* p) { return {*p}; }
inline Int load_slots(const uint32_t* row, int k) { return {row[hash_slot(k)]}; }
inline void store(int32_t* p, Int a) { *p = static_cast<int32_t>(a.v); }
inline Int operator+(Int a, Int b) { return {a.v + b.v}; }
inline Int operator-(Int a, Int b) { return {a.v - b.v}; }
inline Int operator*(Int a, Int b) { return {a.v * b.v}; }
inline Int operator&(Int a, Int b) { return {a.v & b.v}; }
inline Int operator^(Int a, Int b) { return {a.v ^ b.v}; }
inline Int operator<<(Int a, int n) { return {a.v << n}; }
inline Int operator>>(Int a, int n) { return {a.v >> n}; }
inline Int shift_right_signed(Int a, int n) {
  return {static_cast<uint32_t>(static_cast<int32_t>(a.v) >> n)};
}
inline Int lesser_unsigned(Int a, Int b) { return {a.v < b.v ? a.v : b.v}; }
// To nearest, ties to even. Of what fits no int32 nothing is promised.
inline Int round_to_int(Vec a) {
  if (!(a.v > -2147483648.0f && a.v < 2147483648.0f))
    return {0x80000000u};  // as x86's instruction; others differ
  return {static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(a.v)))};
}
inline Vec to_float(Int a) { return {static_cast<float>(static_cast<int32_t>(a.v))}; }
inline Int bits(Vec a) {
  Int i;
  __builtin_memcpy(&i, &a, 4);
  return i;
}
inline Vec from_bits(Int a) {
  Vec f;
  __builtin_memcpy(&f, &a, 4);
  return f;
}

inline Wide widen(Int a) { return {a.v}; }
inline Wide factors(Int a) { return {a.v}; }
inline Wide operator*(Wide a, Int x) { return {a.v * x.v}; }
inline Wide operator+(Wide a, Wide b) { return {a.v + b.v}; }
inline Int low(Wide a) { return {static_cast<uint32_t>(a.v)}; }
inline Int high(Wide a) { return {static_cast<uint32_t>(a.v >> 32)}; }

// ---- Quantised rows

// Twice a register's columns, as they come out of bytes with two columns each.
struct Pair {
  Vec even, odd;
};
// Columns of two registers, in order, into (even, odd) ones, and back.
inline void split_columns(Vec&, Vec&) {}
inline void join_columns(Vec&, Vec&) {}
// Bytes as integers, and the four-bit halves of bytes as numbers (the even column in the low half). "Past":
// of the first lanes only, and up to a whole register's bytes may be read behind them: 7 bytes, 3 of halves.
inline Int load_bytes(const uint8_t* p) { return {*p}; }
inline Int load_bytes(const uint8_t* p, Mask k) { return {k.m ? *p : 0u}; }
inline Int load_bytes_past(const uint8_t* p, Mask k) { return load_bytes(p, k); }
inline Vec load_nibbles(const uint8_t* row, int64_t column) {
  return {static_cast<float>(row[column / 2] >> column % 2 * 4 & 15)};
}
inline Vec load_nibbles_past(const uint8_t* row, int64_t column, Mask k) {
  return k.m ? load_nibbles(row, column) : zero();
}
inline Pair load_nibble_pairs(const uint8_t* row, int64_t column) {
  return {load_nibbles(row, column), load_nibbles(row, column + 1)};
}
inline Pair load_nibble_pairs_past(const uint8_t* row, int64_t column, Mask) {
  return load_nibble_pairs(row, column);
}

// ---- Matrix products

// Rows and registers of columns of a product's tile; dhe/gemm.h says why.
constexpr int tile_rows = 4, tile_vectors = 4;

inline Vec load_half(const uint16_t* p) { return {to_float(Half{*p})}; }
// fma(a, b, sum), in the register of `sum`.
inline Vec accumulate(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
// sum + four products of the bytes of each lane, unsigned times signed.
inline Int dot4(Int sum, Int levels, Int weights) {
  int32_t total = static_cast<int32_t>(sum.v);
  for (int shift = 0; shift < 32; shift += 8)
    total += static_cast<int32_t>(levels.v >> shift & 0xff) * static_cast<int8_t>(weights.v >> shift & 0xff);
  return {static_cast<uint32_t>(total)};
}
// The low bytes of the lanes.
inline void store_bytes(uint8_t* p, Int a) { *p = static_cast<uint8_t>(a.v); }
// Of hash h, bit 2^30: as a number of Vec::width bits.
inline uint32_t sign_bits(Int h) { return h.v >> 30; }
// For each group of four hashes their four signs times 64, in 16 bits; h: those from the j-th on.
inline void store_sign_codes(uint16_t* codes, int j, Int h) {
  uint16_t* to = codes + j / 4;
  const uint32_t bits = sign_bits(h);
  *to = static_cast<uint16_t>((j % 4 == 0 ? 0 : *to) | bits << (6 + j % 4));
}

// Of a group of products of pairs; dense/interaction.h says why.
constexpr int group_rows = 4, group_vectors = 4;
// rows[i * stride + j], i < count <= width, j < columns <= width, to out[j * pitch + i]; zeros for i >=
// count.
inline void transpose_tile(const float* rows, int64_t, int count, int, float* out, int64_t) {
  *out = count > 0 ? *rows : 0.0f;
}

inline void prefetch_to_write(const void* p) { prefetch(p); }

}  // namespace mprec::MPREC_ISA
