// The kernel for tables of float16 and bfloat16; included by one file per ISA.
#pragma once
#include "gradient/update.h"

namespace mprec::MPREC_ISA {

void apply16(const RowGradients& g, const TableRows& t, const Update& u, float* scratch) {
  if (t.format == Format::f16)
    apply_to<Half>(g, t, u, false, scratch);
  else
    apply_to<BFloat>(g, t, u, false, scratch);
}

void add16(const RowGradients& g, Format format, float* sums) {
  if (format == Format::f16)
    add_to<Half>(g, sums);
  else
    add_to<BFloat>(g, sums);
}

}  // namespace mprec::MPREC_ISA
