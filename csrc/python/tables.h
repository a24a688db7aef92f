// Matrices and embedding tables as Python passes them, checked.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/error.h"
#include "embedding_bag/embedding_bag.h"
#include "python/arguments.h"
#include "python/tensor.h"

namespace mprec::python {

inline void check_matrix(const Tensor& t, const char* name) {
  if (t.ndim != 2) throw NotTaken(NotTaken::value, message(name, ": expected 2 dimensions, got ", t.ndim));
  if (t.shape[0] > 0 && t.shape[1] > 1 && t.strides[1] != 1)
    throw NotTaken(NotTaken::value,
                   message(name, ": expected rows of adjacent values, got stride ", t.strides[1]));
}

// A matrix of adjacent values in each row.
inline Tensor matrix(PyObject* object, const char* name, Sign sign = Sign::ask) {
  const Tensor t = view(object, name, sign);
  check_matrix(t, name);
  return t;
}

inline Tensor float_matrix(PyObject* object, const char* name) {
  const Tensor t = matrix(object, name);
  if (t.dtype != DType::f32)
    throw NotTaken(NotTaken::type, message(name, ": expected float32, got ", dtype_name(t.dtype)));
  return t;
}

// As float_matrix(), and: [rows, columns].
inline Tensor float_matrix(PyObject* object, const char* name, int64_t rows, int64_t columns) {
  const Tensor t = float_matrix(object, name);
  check_shape(t, name, {rows, columns});
  return t;
}

inline std::optional<Format> plain_format(DType dtype) {
  switch (dtype) {
    case DType::f32: return Format::f32;
    case DType::f16: return Format::f16;
    case DType::bf16: return Format::bf16;
    default: return std::nullopt;
  }
}

inline const FormatTraits& quantised_format(long long code) {
  for (int i = 0; i < num_formats; ++i) {
    const FormatTraits& format = traits(static_cast<Format>(i));
    if (format.quantised && format.code == code) return format;
  }
  std::string codes;
  for (int i = 0; i < num_formats; ++i)
    if (const FormatTraits& format = traits(static_cast<Format>(i)); format.quantised)
      codes += (codes.empty() ? "" : " or ") + std::to_string(format.code);
  throw pybind11::value_error(message("bits: expected ", codes, ", got ", code));
}

// A table. uint8 holds quantised rows of `bits` (an int) per value, with their scale and bias.
inline PooledTable table(const Tensor& t, const char* name, PyObject* bits) {
  PooledTable to{};
  to.rows = t.ptr<char>();
  to.num_rows = t.shape[0];
  to.row_bytes = t.strides[0] * t.item_bytes();
  if (const auto format = plain_format(t.dtype)) {
    to.format = *format;
    to.dim = t.shape[1];
  } else if (t.dtype == DType::u8) {
    const FormatTraits& format = quantised_format(bits == Py_None ? 8 : integer(bits, "bits"));
    to.format = format.format;
    if (t.shape[1] < format.bytes(0))
      throw pybind11::value_error(message(name, ": expected at least ", format.bytes(0),
                                          " bytes for the scale of a row of ", format.name, ", got ",
                                          t.shape[1]));
    to.dim = format.dim(t.shape[1]);
  } else {
    throw NotTaken(NotTaken::type,
                   message(name, ": expected float32, float16, bfloat16 or uint8 (quantised rows), got ",
                           dtype_name(t.dtype)));
  }
  return to;
}

}  // namespace mprec::python
