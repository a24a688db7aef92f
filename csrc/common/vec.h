// The vector type that kernels are written over: `Vec`, a register of floats of the ISA for which the
// including file is compiled. Everything lives in a namespace named after that ISA, so that the linker can
// never take one ISA's copy of an inline function for another's; for the same reason a file compiled for an
// ISA must not instantiate templates of namespace std.
#pragma once
#include <cstdint>

#include "common/prefetch.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__AVX512BF16__)
#define MPREC_ISA avx512bf16
#elif defined(__AVX512VNNI__)
#define MPREC_ISA avx512vnni
#else
#define MPREC_ISA avx512
#endif
#elif defined(__AVX2__)
#include <immintrin.h>
#define MPREC_ISA avx2
#else
#define MPREC_ISA scalar
#endif

namespace mprec::MPREC_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  static constexpr bool free_masks = true;  // a masked load or store costs what a plain one does
  __m512 v;
};
// The first n lanes, 0 <= n <= width: loads zero the others and do not read them, stores leave them alone.
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
// a * b + c, rounded once where the ISA can.
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b in each lane; so b where either is NaN.
inline Vec greater(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec lesser(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

#elif defined(__AVX2__)

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

#else

struct Vec {
  static constexpr int width = 1;
  static constexpr bool free_masks = true;
  float v;
};
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
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec greater(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec lesser(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline float sum(Vec a) { return a.v; }

#endif

#if defined(__PRFCHW__)
inline void prefetch_to_write(const void* p) { asm volatile("prefetchw %a0" : : "p"(p)); }
#else
inline void prefetch_to_write(const void* p) { prefetch(p); }
#endif

}  // namespace mprec::MPREC_ISA
