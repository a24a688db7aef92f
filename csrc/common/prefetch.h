// Asks for a cache line that will be read.
#pragma once

namespace mprec {

// A statement of its own: GCC takes a function of a builtin prefetch for one without effects, and may drop
// its calls. Always inlined: files compiled for several ISAs must not share a copy.
__attribute__((always_inline)) static inline void prefetch(const void* p) {
  asm volatile("prefetcht0 %a0" : : "p"(p));
}
// The same, to the L2 cache: of what would drive out of the L1 cache what is needed sooner.
__attribute__((always_inline)) static inline void prefetch_l2(const void* p) {
  asm volatile("prefetcht1 %a0" : : "p"(p));
}

}  // namespace mprec
