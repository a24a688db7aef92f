// AVX-512 with VNNI and BF16.
#pragma once
#define MPREC_ISA avx512bf16
#include "isa/avx512_base.h"
#include "isa/vnni.h"

namespace mprec::MPREC_ISA {
// sum + the two products of bfloat16 numbers of each lane. The macro says that there is such an instruction.
#define MPREC_DOT2
inline Vec dot2(Vec sum, Vec a, Vec b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
}  // namespace mprec::MPREC_ISA
