// The kernel for tables of float32, and its table of functions; included by one file per ISA.
#pragma once
#include "gradient/update.h"

namespace mprec::MPREC_ISA {

inline void apply(const RowGradients& g, const TableRows& t, const Update& u, bool compact, float* scratch) {
  if (t.format != Format::f32) return apply16(g, t, u, scratch);
  apply_to<float>(g, t, u, compact, scratch);
}

inline void add(const RowGradients& g, Format format, float* sums) {
  if (g.narrow) return add16(g, format, sums);
  add_to<float>(g, sums);
}

extern const GradientKernels gradient_kernels = {apply, add};

}  // namespace mprec::MPREC_ISA
