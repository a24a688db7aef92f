// A first layer in int8: the hashes' top 7 bits, 0 ... 127, times weights -127 ... 127 in int32.
//
// u = (2 level - 127) / 127, so sum w u = scale * sum q level + offset with w = q w_max / 127 (decoder.cpp
// folds the offset into the bias). 7 bits, because the product of AVX2 adds pairs in 16 bits: 2 * 127 * 127
// fits.
#pragma once
#include "dhe/gemm.h"
#include "dhe/hash.h"

namespace mprec::MPREC_ISA {

// sum + four products of the bytes of each lane, unsigned times signed. The additions are not intrinsics:
// with those gcc 12 keeps a tile's accumulators in memory.
#if defined(__AVX512VNNI__)
inline Int dot4(Int sum, Int levels, Int weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(levels.v), "v"(weights.v));
  return sum;
}
#elif defined(__AVX2__)
inline Int dot4(Int sum, Int levels, Int weights) {
  const IntRegister pairs = MPREC_MM(maddubs_epi16)(levels.v, weights.v);
  const IntRegister products = MPREC_MM(madd_epi16)(pairs, MPREC_MM(set1_epi16)(1));
  asm("vpaddd %1, %0, %0" : "+v"(sum.v) : "v"(products));
  return sum;
}
#else
inline Int dot4(Int sum, Int levels, Int weights) {
  int32_t total = static_cast<int32_t>(sum.v);
  for (int shift = 0; shift < 32; shift += 8)
    total += static_cast<int32_t>(levels.v >> shift & 0xff) * static_cast<int8_t>(weights.v >> shift & 0xff);
  return {static_cast<uint32_t>(total)};
}
#endif

struct Int8Product {
  using Input = uint8_t;
  using Weight = int8_t;
  using Sum = Int;
  static constexpr int group = 4, block = level_columns;
  static constexpr int row_pitch = level_pitch, step_pitch = 4;
  static constexpr int weight_pitch = panel_columns * 4;
  static constexpr int unpack_rows = never;
  static Int zero() { return broadcast_int(0); }
  static Int broadcast_input(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return broadcast_int(four);
  }
  static Int load_weights(const int8_t* p) { return load(reinterpret_cast<const uint32_t*>(p)); }
  static Int multiply_add(Int levels, Int w, Int sum) { return dot4(sum, levels, w); }
  static Int add(Int a, Int b) { return a + b; }
  static Int start(Vec) { return zero(); }
  static Vec finish(Int sum, Vec before, const float* scale) {
    return fma(to_float(sum), load(scale), before);
  }
};

// The low bytes of the lanes.
#if defined(__AVX512F__)
inline void store_bytes(uint8_t* p, Int a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
#elif defined(__AVX2__)
inline void store_bytes(uint8_t* p, Int a) {  // values below 128
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
#else
inline void store_bytes(uint8_t* p, Int a) { *p = static_cast<uint8_t>(a.v); }
#endif

struct StoreLevels {
  uint8_t* out;
  int64_t stride;
  void operator()(int64_t i, int j, Int h) const { store_bytes(out + i * stride + j, h >> 24); }
};

}  // namespace mprec::MPREC_ISA
