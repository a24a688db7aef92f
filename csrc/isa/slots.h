// The order of coefficients in a packed row.
#pragma once

namespace mprec {

// Where universal hash k stands in a packed row of coefficients: the middle two of each four change places
// (isa/x86.h says why). Its own inverse. Always inlined: an emitted copy could be one ISA's, taken for all.
[[gnu::always_inline]] constexpr int hash_slot(int k) { return (k & ~3) | (k & 1) << 1 | (k >> 1 & 1); }

}  // namespace mprec
