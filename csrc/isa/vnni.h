// The product of bytes that VNNI has. No intrinsic: with those gcc 12 keeps a tile's accumulators in memory.
#pragma once

namespace mprec::MPREC_ISA {
inline Int dot4(Int sum, Int levels, Int weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(levels.v), "v"(weights.v));
  return sum;
}
}  // namespace mprec::MPREC_ISA
