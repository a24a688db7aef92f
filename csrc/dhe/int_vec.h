// The integer side of common/vec.h: `Int`, as many 32-bit lanes as Vec has floats, and `Wide`, as many 64-bit
// lanes, for the products of a hash.
//
// Lane j of an Int becomes, by widen(), a 64-bit lane of `even` or of `odd`, by j's parity; low() and high()
// set the halves of the 64-bit lanes side by side again with one shuffle, which takes the lanes of each four
// in the order 0 2 1 3. Coefficients are packed in that order too (hash_slot in dhe.h), so hashes come out in
// their own.
#pragma once
#include "common/vec.h"
#include "dhe/dhe.h"

namespace mprec::MPREC_ISA {

#if defined(__AVX2__)

#if defined(__AVX512F__)
using IntRegister = __m512i;
#define MPREC_MM(operation) _mm512_##operation
#define MPREC_SI(operation) _mm512_##operation##_si512
inline IntRegister low_words() { return _mm512_set1_epi64(0xffffffff); }
inline IntRegister cast_register(__m512 a) { return _mm512_castps_si512(a); }
inline __m512 cast_register(__m512i a) { return _mm512_castsi512_ps(a); }
#else
using IntRegister = __m256i;
#define MPREC_MM(operation) _mm256_##operation
#define MPREC_SI(operation) _mm256_##operation##_si256
inline IntRegister low_words() { return _mm256_set1_epi64x(0xffffffff); }
inline IntRegister cast_register(__m256 a) { return _mm256_castps_si256(a); }
inline __m256 cast_register(__m256i a) { return _mm256_castsi256_ps(a); }
#endif

struct Int {
  IntRegister v;
};
struct Wide {
  IntRegister even, odd;
};

inline Int broadcast_int(uint32_t x) { return {MPREC_MM(set1_epi32)(static_cast<int>(x))}; }
inline Int load(const uint32_t* p) { return {MPREC_SI(loadu)(reinterpret_cast<const IntRegister*>(p))}; }
// Coefficients of hashes k, k + 1, ... from a row in the order that widen() and high() need.
inline Int load_slots(const uint32_t* row, int k) { return load(row + k); }
inline void store(int32_t* p, Int a) { MPREC_SI(storeu)(reinterpret_cast<IntRegister*>(p), a.v); }
inline Int operator+(Int a, Int b) { return {MPREC_MM(add_epi32)(a.v, b.v)}; }
inline Int operator-(Int a, Int b) { return {MPREC_MM(sub_epi32)(a.v, b.v)}; }
inline Int operator*(Int a, Int b) { return {MPREC_MM(mullo_epi32)(a.v, b.v)}; }
inline Int operator&(Int a, Int b) { return {MPREC_SI (and)(a.v, b.v)}; }
inline Int operator^(Int a, Int b) { return {MPREC_SI(xor)(a.v, b.v)}; }
inline Int operator<<(Int a, int n) { return {MPREC_MM(slli_epi32)(a.v, n)}; }
inline Int operator>>(Int a, int n) { return {MPREC_MM(srli_epi32)(a.v, n)}; }  // zeros come in
inline Int shift_right_signed(Int a, int n) { return {MPREC_MM(srai_epi32)(a.v, n)}; }
inline Int lesser_unsigned(Int a, Int b) { return {MPREC_MM(min_epu32)(a.v, b.v)}; }
inline Int round_to_int(Vec a) { return {MPREC_MM(cvtps_epi32)(a.v)}; }  // nearest, ties to even
inline Vec to_float(Int a) { return {MPREC_MM(cvtepi32_ps)(a.v)}; }      // signed
inline Int bits(Vec a) { return {cast_register(a.v)}; }
inline Vec from_bits(Int a) { return {cast_register(a.v)}; }

inline Wide widen(Int a) { return {MPREC_SI (and)(a.v, low_words()), MPREC_MM(srli_epi64)(a.v, 32)}; }
// The same for a factor: of that, multiplication sees the low words only.
inline Wide factors(Int a) { return {a.v, MPREC_MM(srli_epi64)(a.v, 32)}; }
inline Wide operator*(Wide a, Int x) {
  return {MPREC_MM(mul_epu32)(a.even, x.v), MPREC_MM(mul_epu32)(a.odd, x.v)};
}
inline Wide operator+(Wide a, Wide b) {
  return {MPREC_MM(add_epi64)(a.even, b.even), MPREC_MM(add_epi64)(a.odd, b.odd)};
}
inline Int low(Wide a) {
  return {cast_register(MPREC_MM(shuffle_ps)(cast_register(a.even), cast_register(a.odd), 0x88))};
}
inline Int high(Wide a) {
  return {cast_register(MPREC_MM(shuffle_ps)(cast_register(a.even), cast_register(a.odd), 0xDD))};
}
inline Vec pair_first(Vec a) { return {MPREC_MM(shuffle_ps)(a.v, a.v, 0xA0)}; }   // lanes 0 0 2 2 ...
inline Vec pair_second(Vec a) { return {MPREC_MM(shuffle_ps)(a.v, a.v, 0xF5)}; }  // lanes 1 1 3 3 ...

#else

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
inline Int round_to_int(Vec a) {
  if (!(a.v > -2147483648.0f && a.v < 2147483648.0f)) return {0x80000000u};  // as the vector instruction
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

#endif

}  // namespace mprec::MPREC_ISA
