// What is done to a feature-major batch before kernels see it: samples of several are joined, bags of some
// features are copied out, so that one kernel call can serve them; distinct IDs are counted, so that their
// share can be acted on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bags/check.h"
#include "bags/select.h"
#include "common/distinct.h"
#include "python/bags.h"
#include "python/tensor.h"
#include "serving/join.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

py::tuple select(py::handle indices, py::handle offsets, py::handle per_sample_weights,
                 const std::vector<int64_t>& features, int64_t num_features) {
  Bags bags = read_bags(indices.ptr(), offsets.ptr());
  set_features(bags, num_features);
  set_weights(bags, per_sample_weights.ptr());
  check_offsets(bags);
  for (const int64_t f : features)
    if (f < 0 || f >= num_features)
      throw py::value_error(message("features: expected 0 to ", num_features - 1, ", got ", f));
  SelectedBags chosen;
  select_features(bags, features, chosen);
  const auto copied = [](const auto& values, int64_t size, DType dtype) {
    const py::object to = new_tensor({size}, dtype);
    if (size) std::memcpy(view(to.ptr(), "selected").data, values.data(), values.size() * sizeof(values[0]));
    return to;
  };
  const int64_t n = chosen.bags.indices.size;
  return py::make_tuple(copied(chosen.index_bytes, n, bags.indices.wide ? DType::i64 : DType::i32),
                        copied(chosen.starts, chosen.bags.offsets.size, DType::i64),
                        per_sample_weights.is_none() ? py::none() : copied(chosen.weights, n, DType::f32));
}

py::tuple join(const py::list& indices, const py::list& offsets, const std::vector<int64_t>& samples,
               const std::vector<int64_t>& starts, const std::vector<int64_t>& stops, int64_t features) {
  const size_t count = indices.size();
  if (!count || offsets.size() != count || samples.size() != count || starts.size() != count ||
      stops.size() != count)
    throw py::value_error("indices, offsets, samples, starts, stops: expected equally many, at least one");
  std::vector<serving::Part> parts;
  for (size_t i = 0; i < count; ++i) {
    Bags bags = read_bags(py::object(indices[i]).ptr(), py::object(offsets[i]).ptr());
    bags.num_features = features;
    bags.batch = samples[i];
    parts.push_back({bags, starts[i], stops[i]});
  }
  Bags joined = serving::joined_bags(parts, features);
  const auto made = [](Integers& i) {
    const py::object to = new_tensor({i.size}, i.wide ? DType::i64 : DType::i32);
    i.data = view(to.ptr(), "joined").data;
    return to;
  };
  const py::object ids = made(joined.indices), ends = made(joined.offsets);
  serving::join(parts, joined);
  return py::make_tuple(ids, ends);
}

void check_offsets_of(py::handle offsets, int64_t num_indices, bool include_last_offset,
                      int64_t num_features) {
  Bags bags{};
  bags.indices.size = num_indices;
  bags.offsets = integers(offsets.ptr(), "offsets");
  set_features(bags, num_features, include_last_offset);
  check_offsets(bags);
}

void check_ids_of(py::handle indices, py::handle offsets, int64_t batch, int64_t num_features,
                  const Bounds& bounds) {
  Bags bags = read_bags(indices.ptr(), offsets.ptr());
  set_features_of(bags, num_features, batch);
  for (const auto& [feature, bound] : bounds)
    if (feature < 0 || feature >= num_features)
      throw py::value_error(message("bounds: expected features 0 to ", num_features - 1, ", got ", feature));
  check_offsets(bags);
  check_ids(bags, bounds);
}

double unique_share(py::handle indices, py::handle offsets, int64_t num_features) {
  Bags bags = read_bags(indices.ptr(), offsets.ptr());
  set_features(bags, num_features);
  const int64_t n = bags.indices.size;
  double distinct = 0;
  int64_t begin = 0;
  for (int64_t f = 1; n && f <= num_features; ++f) {  // the bags within a feature do not matter
    const int64_t end = bags.feature_begin(f);
    if (end < begin || end > n) throw_first_error(bags, {});
    const auto count = [&](const auto* ids) { return count_distinct(ids + begin, end - begin); };
    distinct += bags.indices.wide ? count(static_cast<const int64_t*>(bags.indices.data))
                                  : count(static_cast<const int32_t*>(bags.indices.data));
    begin = end;
  }
  return n ? std::min(distinct / static_cast<double>(n), 1.0) : 1.0;
}

}  // namespace

void bind_bags(py::module_& m) {
  m.def("select_features", &select, py::arg("indices"), py::arg("offsets"), py::arg("per_sample_weights"),
        py::arg("features"), py::arg("num_features"),
        "(indices, offsets, per_sample_weights or None) of some features of a feature-major batch, new "
        "tensors.");
  m.def("check_offsets", &check_offsets_of, py::arg("offsets"), py::arg("num_indices"),
        py::arg("include_last_offset"), py::arg("num_features") = 1,
        "InvalidOffsetsError unless these offsets of a batch rise from 0 to the number of indices.");
  m.def("check_ids", &check_ids_of, py::arg("indices"), py::arg("offsets"), py::arg("bags"),
        py::arg("num_features"), py::arg("bounds"),
        "IdOutOfRangeError unless IDs of each (feature, bound) are below the bound, or of a bound of -1 not "
        "negative. `bags`: of each feature. Offsets are checked too.");
  m.def("unique_share", &unique_share, py::arg("indices"), py::arg("offsets"), py::arg("num_features"),
        "Distinct IDs of each feature over all IDs of a feature-major batch (see count_distinct in "
        "common/distinct.h); 1 of an empty one.");
  m.def("join_bags", &join, py::arg("indices"), py::arg("offsets"), py::arg("samples"), py::arg("starts"),
        py::arg("stops"), py::arg("features"),
        "(indices, offsets) of samples starts[i] to stops[i] of feature-major batch i, of all batches in "
        "order.\n"
        "int32 where all of them are, int64 otherwise.");
}

}  // namespace mprec::python
