// Bags of deep hash embeddings as Python passes them, checked.
#pragma once
#include <pybind11/pybind11.h>

#include "common/error.h"
#include "dhe/bag.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/tensor.h"

namespace mprec::python {

inline bool flag(PyObject* object) {
  const int set = PyObject_IsTrue(object);
  if (set < 0) throw pybind11::error_already_set();
  return set;
}

// IDs and bags of a batch of `features` features. Offsets of several end with the number of IDs, and their
// padding_idx is not used.
inline DheBagRequest dhe_bags(int64_t features, PyObject* indices, PyObject* offsets,
                              bool include_last_offset, PyObject* padding_idx) {
  DheBagRequest r{};
  r.num_features = features;
  r.indices = integers(view_ids(indices, "indices"));
  r.offsets = integers(view_ids(offsets, "offsets"));
  const int64_t ends = r.offsets.size - include_last_offset;
  if (ends < 0) throw OffsetsError("offsets: expected at least 1 (include_last_offset is set), got 0");
  if (ends % features != 0 || (features > 1 && !include_last_offset))
    throw OffsetsError(message("offsets: expected 1 + a multiple of the number of features, ", features,
                               ", got ", r.offsets.size));
  r.bags = ends / features;
  r.padding_idx = features == 1 ? integer(padding_idx, "padding_idx") : -1;
  return r;
}

// The largest ID that a module allows: None, any.
inline void set_bound(DheBagRequest& r, PyObject* object) {
  if (object == Py_None) return;
  const long long bound = integer(object, "bound");
  if (bound < 1) throw pybind11::value_error(message("bound: expected at least 1, got ", bound));
  r.largest_id = bound - 1;
}

inline void set_pooling(DheBagRequest& r, PyObject* mode, PyObject* per_sample_weights) {
  const Mode parsed = parse_mode(mode);
  r.mode = static_cast<int>(parsed);
  r.per_sample_weights = parse_weights(per_sample_weights, r.indices, parsed);
}

// Where results go. Returns how many columns there are.
inline int64_t set_output(DheBagRequest& r, PyObject* object, bool given) {
  const Tensor out = view(object, "out", given ? Sign::ask : Sign::ignore);
  if (out.dtype != DType::f32)
    throw NotTaken(NotTaken::type, message("out: expected float32, got ", dtype_name(out.dtype)));
  if (out.ndim != 2) throw NotTaken(NotTaken::value, message("out: expected 2 dimension(s), got ", out.ndim));
  if (out.shape[0] != r.bags)
    throw NotTaken(NotTaken::value, message("out: expected ", r.bags, " rows, got ", out.shape[0]));
  if (out.shape[1] > 1 && out.strides[1] != 1)
    throw NotTaken(NotTaken::value,
                   message("out: expected rows of adjacent values, got stride ", out.strides[1]));
  check_output(out, "out");
  if (given) {
    const Extent written(out);
    const Integers weights{r.per_sample_weights, (r.indices.size + 1) / 2, true};  // 4 bytes each
    if (written.meets(Extent(vector_of(r.indices))) || written.meets(Extent(vector_of(r.offsets))) ||
        (r.per_sample_weights && written.meets(Extent(vector_of(weights)))))
      throw NotTaken(NotTaken::value, "out: shares memory with what is read");
  }
  r.out = out.ptr<float>();
  r.out_stride = out.strides[0];
  return out.shape[1];
}

}  // namespace mprec::python
