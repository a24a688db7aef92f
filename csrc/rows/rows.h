// How the rows of a table are stored: each struct gives a register of a row's values from a column on.
// Quantised rows give the stored numbers; their values are scale * number, + bias if they are `biased`.
#pragma once
#include "rows/code.h"
#include "rows/float8.h"
#include "rows/formats.h"
#include "rows/int4.h"
#include "rows/int8.h"
#include "rows/plain.h"

namespace mprec::MPREC_ISA {

// Bytes of a row.
__attribute__((always_inline)) inline int64_t row_size(Format format, int64_t dim) {
  switch (format) {
#define MPREC_CASE(name, Row, users) \
  case Format::name: return Row::bytes(dim);
    MPREC_ALL_FORMATS(MPREC_CASE)
#undef MPREC_CASE
  }
  __builtin_unreachable();
}

}  // namespace mprec::MPREC_ISA
