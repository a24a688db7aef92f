// AVX-512 F, BW, DQ and VL.
#pragma once
#define MPREC_ISA avx512
#include "isa/avx512_base.h"

namespace mprec::MPREC_ISA {
inline Int dot4(Int sum, Int a, Int b) { return dot4_by_pairs(sum, a, b); }
}  // namespace mprec::MPREC_ISA
