// The vector type that kernels are written over: `Vec`, a register of floats, with what goes with it, in a
// namespace named after the ISA, so that the linker can never take one ISA's copy of an inline function for
// another's. For the same reason a file compiled for an ISA must not instantiate templates of namespace std.
//
// The files that CMake makes from list.cmake include the header of their ISA before anything else; all
// others get plain C++.
#pragma once
#ifndef MPREC_ISA
#include "isa/scalar.h"
#endif

namespace mprec::MPREC_ISA {

inline Vec load(const Half* p) { return load16(p); }
inline Vec load(const Half* p, Mask k) { return load16(p, k); }
inline Vec load(const BFloat* p) { return load16(p); }
inline Vec load(const BFloat* p, Mask k) { return load16(p, k); }
inline void store(Half* p, Vec a) { store16(p, a); }
inline void store(Half* p, Vec a, Mask k) { store16(p, a, k); }
inline void store(BFloat* p, Vec a) { store16(p, a); }
inline void store(BFloat* p, Vec a, Mask k) { store16(p, a, k); }

}  // namespace mprec::MPREC_ISA
