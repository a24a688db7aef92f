// AVX-512 F, BW, DQ and VL: what all ISAs with 512 bits share. Included by their headers.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "arch/arch.h"
#include "isa/float16.h"

namespace mprec::MPREC_ISA {

struct Vec {
  static constexpr int width = 16;
  static constexpr bool free_masks = true;
  __m512 v;
};
struct Mask {
  __mmask16 m;
  explicit Mask(int64_t n) : m(static_cast<__mmask16>((1u << n) - 1)) {}
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, Mask k) { return {_mm512_maskz_loadu_ps(k.m, p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, Mask k) { _mm512_mask_storeu_ps(p, k.m, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec greater(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec lesser(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

// ---- float16 and bfloat16

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

using IntRegister = __m512i;
#define MPREC_MM(operation) _mm512_##operation
#define MPREC_SI(operation) _mm512_##operation##_si512
inline IntRegister low_words() { return _mm512_set1_epi64(0xffffffff); }
inline IntRegister cast_register(__m512 a) { return _mm512_castps_si512(a); }
inline __m512 cast_register(__m512i a) { return _mm512_castsi512_ps(a); }

}  // namespace mprec::MPREC_ISA

#include "isa/x86.h"

namespace mprec::MPREC_ISA {

// ---- Quantised rows

struct Pair {
  Vec even, odd;
};
inline void split_columns(Vec& a, Vec& b) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 low = a.v, high = b.v;
  a.v = _mm512_permutex2var_ps(low, even, high);
  b.v = _mm512_permutex2var_ps(low, odd, high);
}
inline void join_columns(Vec& even, Vec& odd) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 a = even.v, b = odd.v;
  even.v = _mm512_permutex2var_ps(a, low, b);
  odd.v = _mm512_permutex2var_ps(a, high, b);
}
inline Int load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Int load_bytes(const uint8_t* p, Mask k) {
  return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(k.m, p))};
}
inline Int load_bytes_past(const uint8_t* p, Mask k) { return load_bytes(p, k); }
// Bytes ba dc .. to 0a 0b 0c 0d ..: each byte widened to 16 bits, its high half moved up by 4 bits.
inline __m128i unpack_nibbles(__m128i bytes) {
  const __m128i wide = _mm_cvtepu8_epi16(bytes);
  return _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
}
inline Vec load_nibbles(const uint8_t* row, int64_t column) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column / 2));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unpack_nibbles(bytes)))};
}
inline Vec load_nibbles_past(const uint8_t* row, int64_t column, Mask k) {
  const auto half = static_cast<__mmask16>(_pext_u32(k.m, 0x5555));
  const __m128i bytes = _mm_maskz_loadu_epi8(half, row + column / 2);
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unpack_nibbles(bytes)))};
}
// A look-up takes the low four bits of each integer for its place: a mask and a conversion in one.
inline Pair separate_nibbles(__m128i bytes) {
  const __m512 value = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i x = _mm512_cvtepu8_epi32(bytes);
  return {{_mm512_permutexvar_ps(x, value)}, {_mm512_permutexvar_ps(_mm512_srli_epi32(x, 4), value)}};
}
inline Pair load_nibble_pairs(const uint8_t* row, int64_t column) {
  return separate_nibbles(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + column / 2)));
}
inline Pair load_nibble_pairs_past(const uint8_t* row, int64_t column, Mask second) {
  const auto bytes = static_cast<__mmask16>(_pext_u32(second.m, 0x5555) << 8 | 0xFF);
  return separate_nibbles(_mm_maskz_loadu_epi8(bytes, row + column / 2));
}

// ---- Matrix products

constexpr int tile_rows = 14, tile_vectors = 2;

inline Vec load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_bytes(uint8_t* p, Int a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline uint32_t sign_bits(Int h) {
  return static_cast<uint32_t>(_mm512_movepi32_mask(_mm512_slli_epi32(h.v, 1)));
}

constexpr int group_rows = 8, group_vectors = 2;
inline void transpose_tile(const float* rows, int64_t stride, int count, int columns, float* out,
                           int64_t pitch) {
  __m512 r[16], t[16];
  const Mask mask(columns);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < count ? load(rows + i * stride, mask).v : _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // quads of rows: 4 x 4 within each 128 bits
    const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]),
                 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // then 4 x 4 of those
    const __m512 a = _mm512_shuffle_f32x4(t[k], t[k + 4], 0x88),
                 b = _mm512_shuffle_f32x4(t[k], t[k + 4], 0xDD),
                 c = _mm512_shuffle_f32x4(t[k + 8], t[k + 12], 0x88),
                 d = _mm512_shuffle_f32x4(t[k + 8], t[k + 12], 0xDD);
    r[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[k + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    r[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[k + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j)
    if (j < columns) store(out + j * pitch, Vec{r[j]});
}

}  // namespace mprec::MPREC_ISA
