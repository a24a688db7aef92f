// Rows that an optimizer updates, read as float32. W stands for one of them: `float*`, or Row16 of 16-bit
// numbers, which rounds what is written to it.
#pragma once
#include "gradient/gradient.h"
#include "rows/rounding.h"

namespace mprec::MPREC_ISA {

template <bool tail, class T>
inline Vec get(const T* p, Mask mask) {
  return tail ? load(p, mask) : load(p);
}
template <bool tail, class T>
inline void put(T* p, Vec x, Mask mask) {
  if (tail)
    store(p, x, mask);
  else
    store(p, x);
}

template <class T>
struct Row16 {
  T* values;
  int64_t column;  // of values[0]
  bool stochastic;
  Noise noise;
  Row16 operator+(int64_t columns) const { return {values + columns, column + columns, stochastic, noise}; }
};
template <bool tail, class T>
inline Vec get(const Row16<T>& row, Mask mask) {
  return get<tail>(row.values, mask);
}
template <bool tail, class T>
inline void put(const Row16<T>& row, Vec x, Mask mask) {
  if (row.stochastic) x = rounded(x, row.noise.at(row.column), T{});
  put<tail>(row.values, x, mask);
}

// Row `row` of a table of T.
inline float* row_at(const TableRows& t, int64_t row, float) {
  return static_cast<float*>(t.weight) + row * t.weight_stride;
}
template <class T>
inline Row16<T> row_at(const TableRows& t, int64_t row, T) {
  return {static_cast<T*>(t.weight) + row * t.weight_stride, 0, t.stochastic, Noise(t.noise, row)};
}
// What stands for a state that a rule does not have: never read or written.
inline float* no_state(float* row) { return row; }
template <class T>
inline float* no_state(const Row16<T>& row) {
  return reinterpret_cast<float*>(row.values);
}

}  // namespace mprec::MPREC_ISA
