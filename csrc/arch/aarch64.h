#pragma once
#include <cstdint>

namespace mprec {

__attribute__((always_inline)) static inline void prefetch(const void* p) {
  asm volatile("prfm pldl1keep, %a0" : : "p"(p));
}
__attribute__((always_inline)) static inline void prefetch_l2(const void* p) {
  asm volatile("prfm pldl2keep, %a0" : : "p"(p));
}

// Most cores take `yield` for no operation; this one waits until the pipeline is empty.
__attribute__((always_inline)) static inline void spin_pause() { asm volatile("isb"); }

__attribute__((always_inline)) static inline unsigned equal_pair(const void* pair, int64_t wanted) {
  const auto* keys = static_cast<const int64_t*>(pair);
  return static_cast<unsigned>(__atomic_load_n(keys, __ATOMIC_RELAXED) == wanted) |
         static_cast<unsigned>(__atomic_load_n(keys + 1, __ATOMIC_RELAXED) == wanted) << 1;
}

// Whether the CPU has SVE with its products of bfloat16 numbers, and the calling thread's vectors are of 256
// bits. Their length is the CPU's, or a shorter one that Linux was told to use (prctl, or a default for all
// programs); threads inherit it.
bool has_sve256();

}  // namespace mprec
