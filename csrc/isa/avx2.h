// AVX2 with FMA, F16C and BMI2.
#pragma once
#define MPREC_ISA avx2
#include <immintrin.h>

#include <cstdint>

#include "arch/arch.h"
#include "isa/float16.h"

namespace mprec::MPREC_ISA {

struct Vec {
  static constexpr int width = 8;
  static constexpr bool free_masks = false;
  __m256 v;
};
struct Mask {
  __m256i m;
  int n;
  explicit Mask(int64_t n) : n(static_cast<int>(n)) {
    alignas(64) static constexpr int32_t window[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                       0,  0,  0,  0,  0,  0,  0,  0};
    m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window + 8 - n));
  }
};

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, Mask k) { return {_mm256_maskload_ps(p, k.m)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, Mask k) { _mm256_maskstore_ps(p, k.m, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec greater(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec lesser(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// ---- float16 and bfloat16

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

using IntRegister = __m256i;
#define MPREC_MM(operation) _mm256_##operation
#define MPREC_SI(operation) _mm256_##operation##_si256
inline IntRegister low_words() { return _mm256_set1_epi64x(0xffffffff); }
inline IntRegister cast_register(__m256 a) { return _mm256_castps_si256(a); }
inline __m256 cast_register(__m256i a) { return _mm256_castsi256_ps(a); }

}  // namespace mprec::MPREC_ISA

#include "isa/x86.h"

namespace mprec::MPREC_ISA {

// ---- Quantised rows

struct Pair {
  Vec even, odd;
};
inline void split_columns(Vec& a, Vec& b) {
  const __m256 low = _mm256_permute2f128_ps(a.v, b.v, 0x20), high = _mm256_permute2f128_ps(a.v, b.v, 0x31);
  a.v = _mm256_shuffle_ps(low, high, 0x88);
  b.v = _mm256_shuffle_ps(low, high, 0xDD);
}
inline void join_columns(Vec& even, Vec& odd) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  even.v = _mm256_permute2f128_ps(low, high, 0x20);
  odd.v = _mm256_permute2f128_ps(low, high, 0x31);
}
inline Int load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline Int load_bytes(const uint8_t* p, Mask k) {
  alignas(8) uint8_t buffer[8] = {};
  for (int i = 0; i < k.n; ++i) buffer[i] = p[i];
  return load_bytes(buffer);
}
inline Int load_bytes_past(const uint8_t* p, Mask) { return load_bytes(p); }
// Bytes ba dc .. to 0a 0b 0c 0d ..: each byte widened to 16 bits, its high half moved up by 4 bits.
inline __m128i unpack_nibbles(__m128i bytes) {
  const __m128i wide = _mm_cvtepu8_epi16(bytes);
  return _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
}
inline Vec load_nibbles(const uint8_t* row, int64_t column) {
  const __m128i bytes = _mm_loadu_si32(row + column / 2);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unpack_nibbles(bytes)))};
}
inline Vec load_nibbles_past(const uint8_t* row, int64_t column, Mask) { return load_nibbles(row, column); }
inline Pair load_nibble_pairs(const uint8_t* row, int64_t column) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column / 2));
  const __m256i x = _mm256_cvtepu8_epi32(bytes);
  return {{_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)))},
          {_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4))}};
}
inline Pair load_nibble_pairs_past(const uint8_t* row, int64_t column, Mask) {
  return load_nibble_pairs(row, column);
}

// ---- Matrix products

constexpr int tile_rows = 6, tile_vectors = 2;

inline Vec load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Int dot4(Int sum, Int a, Int b) { return dot4_by_pairs(sum, a, b); }
inline void store_bytes(uint8_t* p, Int a) {  // values below 128
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline uint32_t sign_bits(Int h) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(h.v, 1))));
}

constexpr int group_rows = 4, group_vectors = 2;
inline void transpose_tile(const float* rows, int64_t stride, int count, int columns, float* out,
                           int64_t pitch) {
  __m256 r[8], t[8];
  const Mask mask(columns);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    r[i] = i >= count    ? _mm256_setzero_ps()
           : columns < 8 ? load(rows + i * stride, mask).v
                         : load(rows + i * stride).v;
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]),
                 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm256_permute2f128_ps(t[k], t[k + 4], 0x20);
    r[k + 4] = _mm256_permute2f128_ps(t[k], t[k + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    if (j < columns) store(out + j * pitch, Vec{r[j]});
}

}  // namespace mprec::MPREC_ISA
