// What no compiler has a portable word for, by CPU architecture: a header and a source file each, here.
//
//   prefetch(p)       asks for a cache line that will be read
//   prefetch_l2(p)    the same, to the L2 cache: of what would drive out of the L1 cache what is needed first
//   spin_pause()      in a loop that waits for another thread
//   equal_pair(k, x)  which of two numbers on 16 bytes are x, bit i for k[i]; they may be written meanwhile
//   cpu_model()       of common/cpu.h, in the source file
//
// Always inlined: files compiled for several ISAs must not share a copy. Prefetches are statements of asm:
// GCC takes a function of a builtin prefetch for one without effects, and may drop its calls.
#pragma once
#if defined(__x86_64__)
#include "arch/x86_64.h"
#elif defined(__aarch64__)
#include "arch/aarch64.h"
#else
#error "csrc/arch has no header for this CPU architecture (docs/adding/isa.md)"
#endif
