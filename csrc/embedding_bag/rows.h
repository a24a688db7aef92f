// How the rows of a table are stored: each type gives a register of a row's values from a column on.
// Quantised rows give the stored integers; their values are scale * integer + bias.
#pragma once
#include "common/vec.h"
#include "common/vec16.h"

namespace mprec::MPREC_ISA {

// Twice a register's columns, as they come out of bytes with two columns each.
struct Pair {
  Vec even, odd;
};

#if defined(__AVX512F__)
// Columns of two registers, in order, into (even, odd) ones, and back.
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
#elif defined(__AVX2__)
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
#else
inline void split_columns(Vec&, Vec&) {}
inline void join_columns(Vec&, Vec&) {}
#endif

template <class T>
struct PlainRow {
  static constexpr bool quantised = false, paired = false;
  static constexpr int bits = 8 * sizeof(T);
  const T* values;
  PlainRow(const char* row, int64_t) : values(reinterpret_cast<const T*>(row)) {}
  Vec at(int64_t column) const { return load(values + column); }
  Vec at(int64_t column, Mask mask) const { return load(values + column, mask); }
};

// dim bytes, then scale and bias as float32 (FBGEMM's fused 8-bit row).
struct Int8Row {
  static constexpr bool quantised = true, paired = false;
  static constexpr int bits = 8;
  const uint8_t* values;
  float scale, bias;
  Int8Row(const char* row, int64_t dim) : values(reinterpret_cast<const uint8_t*>(row)) {
    __builtin_memcpy(&scale, row + dim, 4);
    __builtin_memcpy(&bias, row + dim + 4, 4);
  }
#if defined(__AVX512F__)
  static Vec convert(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))}; }
  Vec at(int64_t column) const {
    return convert(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + column)));
  }
  Vec at(int64_t column, Mask mask) const { return convert(_mm_maskz_loadu_epi8(mask.m, values + column)); }
#elif defined(__AVX2__)
  Vec at(int64_t column) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + column));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
  }
  Vec at(int64_t column, Mask) const { return at(column); }  // the 8 bytes of scale and bias follow
#else
  Vec at(int64_t column) const { return {static_cast<float>(values[column])}; }
  Vec at(int64_t column, Mask mask) const { return mask.m ? at(column) : zero(); }
#endif
};

// dim / 2 bytes, the even column in the low four bits, then scale and bias as float16 (FBGEMM's fused 4-bit
// row).
struct Int4Row {
  static constexpr bool quantised = true, paired = true;
  static constexpr int bits = 4;
  const uint8_t* values;
  float scale, bias;
  Int4Row(const char* row, int64_t dim) : values(reinterpret_cast<const uint8_t*>(row)) {
    Half pair[2];
    __builtin_memcpy(pair, row + dim / 2, sizeof pair);
    to_floats(pair, scale, bias);
  }
#if defined(__AVX2__)
  // Bytes ba dc .. to 0a 0b 0c 0d ..: each byte widened to 16 bits, its high half moved up by 4 bits.
  static __m128i unpack(__m128i bytes) {
    const __m128i wide = _mm_cvtepu8_epi16(bytes);
    return _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
  }
#endif
#if defined(__AVX512F__)
  Vec at(int64_t column) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + column / 2));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unpack(bytes)))};
  }
  Vec at(int64_t column, Mask mask) const {
    const auto half = static_cast<__mmask16>(_pext_u32(mask.m, 0x5555));
    const __m128i bytes = _mm_maskz_loadu_epi8(half, values + column / 2);
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unpack(bytes)))};
  }
  // A look-up takes the low four bits of each integer for its place: a mask and a conversion in one.
  static Pair separate(__m128i bytes) {
    const __m512 value = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i x = _mm512_cvtepu8_epi32(bytes);
    return {{_mm512_permutexvar_ps(x, value)}, {_mm512_permutexvar_ps(_mm512_srli_epi32(x, 4), value)}};
  }
  Pair pair(int64_t column) const {
    return separate(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + column / 2)));
  }
  // `mask`: of the pair's second register.
  Pair pair(int64_t column, Mask mask) const {
    const auto bytes = static_cast<__mmask16>(_pext_u32(mask.m, 0x5555) << 8 | 0xFF);
    return separate(_mm_maskz_loadu_epi8(bytes, values + column / 2));
  }
#elif defined(__AVX2__)
  Vec at(int64_t column) const {
    const __m128i bytes = _mm_loadu_si32(values + column / 2);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unpack(bytes)))};
  }
  Vec at(int64_t column, Mask) const { return at(column); }  // the 4 bytes of scale and bias follow
  Pair pair(int64_t column) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + column / 2));
    const __m256i x = _mm256_cvtepu8_epi32(bytes);
    return {{_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)))},
            {_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4))}};
  }
  Pair pair(int64_t column, Mask) const { return pair(column); }  // 5 bytes or more, and those 4
#else
  Vec at(int64_t column) const { return {static_cast<float>(values[column / 2] >> column % 2 * 4 & 15)}; }
  Vec at(int64_t column, Mask mask) const { return mask.m ? at(column) : zero(); }
  Pair pair(int64_t column) const { return {at(column), at(column + 1)}; }
  Pair pair(int64_t column, Mask) const { return pair(column); }
#endif
};

}  // namespace mprec::MPREC_ISA
