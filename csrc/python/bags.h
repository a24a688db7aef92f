// Tables and bags as Python passes them, checked.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "embedding_bag/embedding_bag.h"
#include "python/arguments.h"
#include "python/tensor.h"

namespace mprec::python {

inline Integers integers(const Tensor& t) { return {t.data, t.shape[0], t.dtype == DType::i64}; }

inline Tensor vector_of(const Integers& i) {
  return {const_cast<void*>(i.data), i.wide ? DType::i64 : DType::i32, 1, {i.size}, {1}, false};
}

// A matrix of adjacent values in each row.
inline Tensor matrix(PyObject* object, const char* name, Sign sign = Sign::ask) {
  const Tensor t = view(object, name, sign);
  if (t.ndim != 2) throw NotTaken(NotTaken::value, message(name, ": expected 2 dimensions, got ", t.ndim));
  if (t.shape[0] > 0 && t.shape[1] > 1 && t.strides[1] != 1)
    throw NotTaken(NotTaken::value,
                   message(name, ": expected rows of adjacent values, got stride ", t.strides[1]));
  return t;
}

inline Tensor float_matrix(PyObject* object, const char* name) {
  const Tensor t = matrix(object, name);
  if (t.dtype != DType::f32)
    throw NotTaken(NotTaken::type, message(name, ": expected float32, got ", dtype_name(t.dtype)));
  return t;
}

inline Feature feature(const Tensor& weight, int64_t first_bag, const Tensor& out, int64_t column) {
  return {weight.ptr<char>(), weight.shape[0],
          weight.shape[1],    weight.strides[0] * static_cast<int64_t>(sizeof(float)),
          first_bag,          out.ptr<float>() + column,
          out.strides[0]};
}

inline std::optional<Format> plain_format(DType dtype) {
  switch (dtype) {
    case DType::f32: return Format::f32;
    case DType::f16: return Format::f16;
    case DType::bf16: return Format::bf16;
    default: return std::nullopt;
  }
}

// A table. uint8 holds quantised rows of `bits` (an int) per value, with their scale and bias.
inline Feature table(const Tensor& t, const char* name, PyObject* bits) {
  Feature f{};
  f.rows = t.ptr<char>();
  f.num_rows = t.shape[0];
  if (const auto format = plain_format(t.dtype)) {
    f.format = *format;
    f.dim = t.shape[1];
  } else if (t.dtype == DType::u8) {
    const long long width = bits == Py_None ? 8 : integer(bits, "bits");
    if (width != 8 && width != 4) throw pybind11::value_error(message("bits: expected 8 or 4, got ", width));
    f.format = width == 8 ? Format::int8 : Format::int4;
    const int64_t extra = width == 8 ? 8 : 4;  // scale and bias
    if (t.shape[1] < extra)
      throw pybind11::value_error(message(name, ": expected at least ", extra,
                                          " bytes for the scale and bias of a row of ", width,
                                          "-bit values, got ", t.shape[1]));
    f.dim = (t.shape[1] - extra) * 8 / width;
  } else {
    throw NotTaken(NotTaken::type,
                   message(name, ": expected float32, float16, bfloat16 or uint8 (quantised rows), got ",
                           dtype_name(t.dtype)));
  }
  f.row_bytes = t.strides[0] * (f.format == Format::f32 ? 4 : t.dtype == DType::u8 ? 1 : 2);
  return f;
}

// A block of columns in a matrix: [begin, end).
using Columns = std::pair<int64_t, int64_t>;

// The `dim` columns from `begin` on. ValueError if a matrix of `width` columns does not hold them.
inline Columns columns_within(int64_t begin, int64_t dim, int64_t width, const std::string& name) {
  if (begin < 0) throw pybind11::value_error(message(name, ": expected a column >= 0, got ", begin));
  if (begin > width - dim)  // begin + dim might overflow
    throw pybind11::value_error(message(name, ": expected at least ",
                                        static_cast<uint64_t>(begin) + static_cast<uint64_t>(dim),
                                        " columns, got ", width));
  return {begin, begin + dim};
}

// ValueError if two blocks share a column: one would overwrite the other.
inline void check_apart(std::vector<Columns> blocks, const char* name) {
  std::sort(blocks.begin(), blocks.end());
  for (size_t i = 1; i < blocks.size(); ++i)
    if (blocks[i].first < blocks[i - 1].second && blocks[i].first < blocks[i].second)
      throw pybind11::value_error(message(name, ": columns ", blocks[i - 1].first, " to ",
                                          blocks[i - 1].second - 1, " and ", blocks[i].first, " to ",
                                          blocks[i].second - 1, " overlap"));
}

inline Mode parse_mode(PyObject* object) {
  const long long mode = integer(object, "mode");
  if (mode < 0 || mode > 2) throw pybind11::value_error(message("mode: expected 0, 1 or 2, got ", mode));
  return static_cast<Mode>(mode);
}

inline const float* parse_weights(PyObject* object, const Integers& indices, Mode mode) {
  if (object == Py_None) return nullptr;
  const Tensor t = view(object, "per_sample_weights", DType::f32, 1);
  if (t.shape[0] != indices.size)
    throw NotTaken(NotTaken::value, message("per_sample_weights: expected as many as indices, ", indices.size,
                                            ", got ", t.shape[0]));
  if (mode == Mode::max) throw NotTaken(NotTaken::value, "per_sample_weights: mode max does not take any");
  return t.ptr<float>();
}

}  // namespace mprec::python
