// How the rows of a table are stored: each type gives a register of a row's values from a column on.
// Quantised rows give the stored integers; their values are scale * integer + bias.
#pragma once
#include "common/vec.h"
#include "common/vec16.h"

namespace mprec::MPREC_ISA {

template <class T>
struct PlainRow {
  static constexpr bool quantised = false;
  static constexpr int bits = 8 * sizeof(T);
  const T* values;
  PlainRow(const char* row, int64_t) : values(reinterpret_cast<const T*>(row)) {}
  Vec at(int64_t column) const { return load(values + column); }
  Vec at(int64_t column, Mask mask) const { return load(values + column, mask); }
};

// dim bytes, then scale and bias as float32 (FBGEMM's fused 8-bit row).
struct Int8Row {
  static constexpr bool quantised = true;
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
  static constexpr bool quantised = true;
  static constexpr int bits = 4;
  const uint8_t* values;
  float scale, bias;
  Int4Row(const char* row, int64_t dim) : values(reinterpret_cast<const uint8_t*>(row)) {
    Half pair[2];
    __builtin_memcpy(pair, row + dim / 2, 4);
    scale = to_float(pair[0]);
    bias = to_float(pair[1]);
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
#elif defined(__AVX2__)
  Vec at(int64_t column) const {
    const __m128i bytes = _mm_loadu_si32(values + column / 2);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unpack(bytes)))};
  }
  Vec at(int64_t column, Mask) const { return at(column); }  // the 4 bytes of scale and bias follow
#else
  Vec at(int64_t column) const { return {static_cast<float>(values[column / 2] >> column % 2 * 4 & 15)}; }
  Vec at(int64_t column, Mask mask) const { return mask.m ? at(column) : zero(); }
#endif
};

}  // namespace mprec::MPREC_ISA
