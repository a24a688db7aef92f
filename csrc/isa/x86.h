// What AVX2 and AVX-512 spell alike, over the registers of the including header: it defines IntRegister,
// MPREC_MM and MPREC_SI (the names of its intrinsics), low_words and cast_register.
//
// Lane j of an Int becomes, by widen(), a 64-bit lane of `even` or of `odd`, by j's parity; low() and high()
// set the halves of the 64-bit lanes side by side again with one shuffle, which takes the lanes of each four
// in the order 0 2 1 3. Coefficients are packed in that order too (slots.h), so hashes come out in
// their own.
#pragma once

namespace mprec::MPREC_ISA {

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

// fma(a, b, sum), in the register of `sum`: left to choose, gcc 12 moves a tile's accumulators about, and
// spills some.
inline Vec accumulate(Vec a, Vec b, Vec sum) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}

// sum + four products of the bytes of each lane, unsigned times signed; sums of two must fit 16 bits. The
// addition is no intrinsic: with those gcc 12 keeps a tile's accumulators in memory.
inline Int dot4_by_pairs(Int sum, Int levels, Int weights) {
  const IntRegister pairs = MPREC_MM(maddubs_epi16)(levels.v, weights.v);
  const IntRegister products = MPREC_MM(madd_epi16)(pairs, MPREC_MM(set1_epi16)(1));
  asm("vpaddd %1, %0, %0" : "+v"(sum.v) : "v"(products));
  return sum;
}

inline uint32_t sign_bits(Int h);
inline void store_sign_codes(uint16_t* codes, int j, Int h) {
  uint16_t* to = codes + j / 4;
  const uint32_t bits = sign_bits(h);
  const uint64_t four = _pdep_u64(bits, 0x03c003c003c003c0);  // 16 bits to four codes times 64
  __builtin_memcpy(to, &four, Vec::width / 2);
}

inline void to_floats(const Half (&pair)[2], float& first, float& second) {
  int bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  const __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
  first = _mm_cvtss_f32(both);
  second = _mm_cvtss_f32(_mm_movehdup_ps(both));
}

inline void prefetch_to_write(const void* p) { asm volatile("prefetchw %a0" : : "p"(p)); }

}  // namespace mprec::MPREC_ISA
