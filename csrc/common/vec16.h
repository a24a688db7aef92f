// float16 and bfloat16 in memory, Vec in registers. Stores round to nearest, ties to even.
#pragma once
#include "common/vec.h"

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

#if defined(__AVX512F__)

inline __m512 widen(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }
inline __m512 widen(__m256i bits, BFloat) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m256i narrow(Vec a, Half) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i narrow(Vec a, BFloat) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
template <class T>
Vec load16(const T* p) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{})};
}
template <class T>
Vec load16(const T* p, Mask k) {
  return {widen(_mm256_maskz_loadu_epi16(k.m, p), T{})};
}
template <class T>
void store16(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
void store16(T* p, Vec a, Mask k) {
  _mm256_mask_storeu_epi16(p, k.m, narrow(a, T{}));
}
inline float to_float(Half h) { return _cvtsh_ss(h.bits); }

#elif defined(__AVX2__)

inline __m256 widen(__m128i bits, Half) { return _mm256_cvtph_ps(bits); }
inline __m256 widen(__m128i bits, BFloat) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m128i narrow(Vec a, Half) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i narrow(Vec a, BFloat) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
template <class T>
Vec load16(const T* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{})};
}
template <class T>
Vec load16(const T* p, Mask k) {  // AVX2 has no masked load of 16 bits
  alignas(16) T buffer[8] = {};
  for (int i = 0; i < k.n; ++i) buffer[i] = p[i];
  return load16(buffer);
}
template <class T>
void store16(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
void store16(T* p, Vec a, Mask k) {
  alignas(16) T buffer[8];
  store16(buffer, a);
  for (int i = 0; i < k.n; ++i) p[i] = buffer[i];
}
inline float to_float(Half h) { return _cvtsh_ss(h.bits); }

#else

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

#endif

inline void to_floats(const Half (&pair)[2], float& first, float& second) {
#if defined(__AVX2__)
  int bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  const __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
  first = _mm_cvtss_f32(both);
  second = _mm_cvtss_f32(_mm_movehdup_ps(both));
#else
  first = to_float(pair[0]);
  second = to_float(pair[1]);
#endif
}

inline Vec load(const Half* p) { return load16(p); }
inline Vec load(const Half* p, Mask k) { return load16(p, k); }
inline Vec load(const BFloat* p) { return load16(p); }
inline Vec load(const BFloat* p, Mask k) { return load16(p, k); }
inline void store(Half* p, Vec a) { store16(p, a); }
inline void store(Half* p, Vec a, Mask k) { store16(p, a, k); }
inline void store(BFloat* p, Vec a) { store16(p, a); }
inline void store(BFloat* p, Vec a, Mask k) { store16(p, a, k); }

}  // namespace mprec::MPREC_ISA
