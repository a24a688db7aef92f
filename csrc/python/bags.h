// A batch's bags as Python passes them. What is checked here is what needs no look at the values of offsets
// and IDs.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bags/bags.h"
#include "bags/check.h"
#include "common/error.h"
#include "python/arguments.h"
#include "python/tensor.h"

namespace mprec::python {

inline Integers integers(PyObject* object, const char* name) {
  const Tensor t = view_ids(object, name);
  return {t.data, t.shape[0], t.dtype == DType::i64};
}

// Indices and offsets. Of which features, and how many bags each, one of the two functions below says.
inline Bags read_bags(PyObject* indices, PyObject* offsets) {
  Bags b;
  b.indices = integers(indices, "indices");
  b.offsets = integers(offsets, "offsets");
  return b;
}

// Features of as many bags each as there are offsets for; of several features the last offset is there.
inline void set_features(Bags& b, int64_t num_features, bool include_last_offset = true) {
  if (num_features < 1)
    throw pybind11::value_error(message("num_features: expected at least 1, got ", num_features));
  const int64_t bags = b.offsets.size - include_last_offset;
  if (bags < 0) throw OffsetsError("offsets: expected at least 1 (include_last_offset is set), got 0");
  if (bags % num_features != 0 || (num_features > 1 && !include_last_offset))
    throw OffsetsError(message("offsets: expected 1 + a multiple of the number of features, ", num_features,
                               ", got ", b.offsets.size));
  b.num_features = num_features;
  b.batch = bags / num_features;
}

// Features of `batch` bags each; the last offset may be missing.
inline void set_features_of(Bags& b, int64_t num_features, int64_t batch) {
  const bool too_many = batch > b.offsets.size || (batch > 0 && num_features > b.offsets.size);
  const int64_t last = too_many ? -1 : b.offsets.size - num_features * batch;
  if (num_features < 1 || batch < 0 || (last != 0 && last != 1))
    throw OffsetsError(
        message("offsets: expected ", num_features, " times ", batch, " or one more, got ", b.offsets.size));
  b.num_features = num_features;
  b.batch = batch;
}

inline void set_weights(Bags& b, PyObject* per_sample_weights) {
  if (per_sample_weights == Py_None) return;
  const Tensor t = view(per_sample_weights, "per_sample_weights", DType::f32, 1);
  if (t.shape[0] != b.indices.size)
    throw NotTaken(NotTaken::value, message("per_sample_weights: expected as many as indices, ",
                                            b.indices.size, ", got ", t.shape[0]));
  b.per_sample_weights = t.ptr<float>();
}

inline Mode pooling_mode(long long number) {
  if (number < 0 || number > 2)
    throw pybind11::value_error(message("mode: expected 0, 1 or 2, got ", number));
  return static_cast<Mode>(number);
}

inline void set_pooling(Bags& b, Mode mode, PyObject* per_sample_weights) {
  b.mode = mode;
  set_weights(b, per_sample_weights);
  if (b.mode == Mode::max && b.per_sample_weights)
    throw NotTaken(NotTaken::value, "per_sample_weights: mode max does not take any");
}

// `padding_idx`: None where several features are pooled, which have none.
inline void set_pooling(Bags& b, PyObject* mode, PyObject* per_sample_weights, PyObject* padding_idx) {
  set_pooling(b, pooling_mode(integer(mode, "mode")), per_sample_weights);
  if (padding_idx != Py_None) b.padding_idx = integer(padding_idx, "padding_idx");
}

// The largest ID that a module's `bound` allows; None: any.
inline int64_t largest_id(PyObject* bound) {
  if (bound == Py_None) return INT64_MAX;
  const long long value = integer(bound, "bound");
  if (value < 1) throw pybind11::value_error(message("bound: expected at least 1, got ", value));
  return value - 1;
}

// Which of a batch's features tables or decoders serve, one for each; empty: all, in order.
inline std::vector<int64_t> features_of(const List& named, int64_t num_features) {
  std::vector<int64_t> features;
  for (Py_ssize_t t = 0; t < named.size(); ++t) features.push_back(named.up_to(num_features - 1, t));
  return features;
}

}  // namespace mprec::python
