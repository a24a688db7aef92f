// Rows of numbers as they are: float32, float16 or bfloat16.
#pragma once
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

template <class T>
struct PlainRow {
  static constexpr bool quantised = false, paired = false;
  static constexpr int bits = 8 * sizeof(T), code = 0;
  static constexpr int64_t bytes(int64_t dim) { return static_cast<int64_t>(sizeof(T)) * dim; }
  static constexpr int64_t dim(int64_t columns) { return columns; }
  const T* values;
  PlainRow(const char* row, int64_t) : values(reinterpret_cast<const T*>(row)) {}
  Vec at(int64_t column) const { return load(values + column); }
  Vec at(int64_t column, Mask mask) const { return load(values + column, mask); }
};

}  // namespace mprec::MPREC_ISA
