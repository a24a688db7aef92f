// Where the pooled vectors of a batch go: what Python passed, or a new tensor.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bags/bags.h"
#include "common/error.h"
#include "python/tables.h"
#include "python/tensor.h"

namespace mprec::python {

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

// float32, float16 or bfloat16.
class Output {
 public:
  // `passed` or, of None, a new matrix of `columns`; one row for each of the `bags`. `flat`: what is passed
  // has one dimension, and is contiguous.
  Output(PyObject* passed, int64_t bags, int64_t columns, DType dtype, bool flat = false)
      : given_(passed != Py_None),
        object_(given_ ? pybind11::reinterpret_borrow<pybind11::object>(passed)
                       : new_tensor({bags, columns}, dtype)),
        tensor_(view(object_.ptr(), "out", given_ ? Sign::ask : Sign::ignore)) {
    if (!flat) check_matrix(tensor_, "out");
    if (flat && (tensor_.ndim != 1 || !tensor_.contiguous()))
      throw NotTaken(NotTaken::value,
                     message("out: expected 1 dimension(s), contiguous, got ", tensor_.ndim));
    const auto plain = plain_format(tensor_.dtype);
    if (!plain)
      throw NotTaken(NotTaken::type,
                     message("out: expected float32, float16 or bfloat16, got ", dtype_name(tensor_.dtype)));
    format_ = *plain;
    if (!flat && tensor_.shape[0] != bags)
      throw NotTaken(NotTaken::value, message("out: expected one row for each of the ", bags, " bags, got ",
                                              tensor_.shape[0]));
    check_output(tensor_, "out");
  }

  // Writing must not change what is read.
  void check_apart_from(const Bags& bags, const Tensor* tables = nullptr, size_t count = 0) const {
    if (!given_) return;
    const Extent written(tensor_);
    const auto extent = [](const Integers& i) { return Extent(i.data, i.size * (i.wide ? 8 : 4)); };
    bool meets = written.meets(extent(bags.indices)) || written.meets(extent(bags.offsets));
    if (bags.per_sample_weights)
      meets |= written.meets(Extent(bags.per_sample_weights, bags.indices.size * 4));
    for (size_t t = 0; t < count; ++t) meets |= written.meets(Extent(tables[t]));
    if (meets) throw NotTaken(NotTaken::value, "out: shares memory with what is read");
  }

  // The table's bags go to `column` and on. Returns the columns taken.
  Columns place_columns(PooledTable& t, int64_t column) const {
    const Columns columns = columns_within(column, t.dim, width(), "out");
    place(t, column, tensor_.strides[0]);
    return columns;
  }
  // Of a flat one: the table's [bags, dim] side by side, from `element` on.
  void place_block(PooledTable& t, int64_t bags, int64_t element) const {
    if (bags > 0 && t.dim > (tensor_.shape[0] - element) / bags)  // bags * dim might overflow
      throw pybind11::value_error(message("out: expected at least ",
                                          element + static_cast<double>(bags) * t.dim, " elements, got ",
                                          tensor_.shape[0]));
    place(t, element, t.dim);
  }

  // Of kernels that write no other type.
  float* float32() const {
    if (tensor_.dtype != DType::f32)
      throw NotTaken(NotTaken::type, message("out: expected float32, got ", dtype_name(tensor_.dtype)));
    return tensor_.ptr<float>();
  }
  int64_t stride() const { return tensor_.strides[0]; }
  int64_t width() const { return tensor_.shape[tensor_.ndim - 1]; }

  // The tensor, after it was written.
  pybind11::object written() const {
    if (given_) count_write(object_.ptr());
    return object_;
  }

 private:
  void place(PooledTable& t, int64_t element, int64_t stride) const {
    t.out = reinterpret_cast<float*>(tensor_.ptr<char>() + element * tensor_.item_bytes());
    t.out_stride = stride;
    t.out_format = format_;
  }

  bool given_;
  pybind11::object object_;
  Tensor tensor_;
  Format format_;
};

}  // namespace mprec::python
