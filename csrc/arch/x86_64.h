#pragma once
#include <emmintrin.h>

#include <cstdint>

namespace mprec {

__attribute__((always_inline)) static inline void prefetch(const void* p) {
  asm volatile("prefetcht0 %a0" : : "p"(p));
}
__attribute__((always_inline)) static inline void prefetch_l2(const void* p) {
  asm volatile("prefetcht1 %a0" : : "p"(p));
}

__attribute__((always_inline)) static inline void spin_pause() { __builtin_ia32_pause(); }

__attribute__((always_inline, no_sanitize("thread"))) static inline unsigned equal_pair(const void* pair,
                                                                                        int64_t wanted) {
  const __m128i two = _mm_load_si128(static_cast<const __m128i*>(pair));
  const __m128i halves = _mm_cmpeq_epi32(two, _mm_set1_epi64x(wanted));  // SSE2 compares no 64-bit numbers
  const __m128i whole = _mm_and_si128(halves, _mm_shuffle_epi32(halves, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<unsigned>(_mm_movemask_pd(_mm_castsi128_pd(whole)));
}

// Whether Linux gives this process the registers of AMX. It does when asked (arch_prctl, from 5.16 on), to
// all threads; it says no where a signal handler's stack would not hold them.
bool lends_tiles();

}  // namespace mprec
