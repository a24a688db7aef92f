// Rows that an optimizer updates and their gradients, read as float32. W stands for one of the rows:
// `float*`, or Row16 of 16-bit numbers, which rounds what is written to it.
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
  return {static_cast<T*>(t.weight) + row * t.weight_stride, 0, t.stochastic,
          t.stochastic ? Noise(t.noise, row) : Noise()};
}

// Gradients of a table of 16 bits: its numbers, or float32.
template <class T>
struct Gradient16 {
  const void* values;
  bool narrow;
  Gradient16 operator+(int64_t columns) const {
    const int64_t bytes = columns * static_cast<int64_t>(narrow ? sizeof(T) : sizeof(float));
    return {static_cast<const char*>(values) + bytes, narrow};
  }
};
template <bool tail, class T>
inline Vec get(Gradient16<T> g, Mask mask) {
  return g.narrow ? get<tail>(static_cast<const T*>(g.values), mask)
                  : get<tail>(static_cast<const float*>(g.values), mask);
}
// Those of bag 0, for a table of T.
inline const float* gradients_of(const RowGradients& g, float) { return static_cast<const float*>(g.grad); }
template <class T>
inline Gradient16<T> gradients_of(const RowGradients& g, T) {
  return {g.grad, g.narrow};
}

// What stands for a state that a rule does not have: never read or written.
inline float* no_state(float* row) { return row; }
template <class T>
inline float* no_state(const Row16<T>& row) {
  return reinterpret_cast<float*>(row.values);
}

}  // namespace mprec::MPREC_ISA
