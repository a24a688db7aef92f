// What is done to a feature-major batch before kernels see it: bags of some features are copied out, so that
// one kernel call can serve them; distinct IDs are counted, so that their share can be acted on.
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

namespace py = pybind11;

namespace mprec::python {
namespace {

int64_t offset(const Tensor& t, int64_t i) {
  return t.dtype == DType::i64 ? t.ptr<int64_t>()[i] : t.ptr<int32_t>()[i];
}

int64_t batch_of(const Tensor& offsets, int64_t num_features) {
  if (num_features < 1 || offsets.shape[0] < 1 || (offsets.shape[0] - 1) % num_features)
    throw OffsetsError(message("offsets: expected 1 + a multiple of the number of features, ", num_features,
                               ", got ", offsets.shape[0]));
  return (offsets.shape[0] - 1) / num_features;
}

// What is checked elsewhere too: offsets of `num_features` features.
BagLayout checked_layout(const Tensor& ids, const Tensor& starts, int64_t num_features) {
  const BagLayout layout = BagLayout{num_features, batch_of(starts, num_features)};
  check_offsets(integers(starts), ids.shape[0], layout);
  return layout;
}

// Writes the features' indices (and per-sample weights) one feature after the other, and their offsets;
// returns the number of indices.
int64_t select_features_into(py::handle indices, py::handle offsets, py::handle per_sample_weights,
                             const std::vector<int64_t>& features, int64_t num_features,
                             py::handle out_indices, py::handle out_offsets, py::handle out_weights) {
  const Tensor ids = view_ids(indices.ptr(), "indices"), starts = view_ids(offsets.ptr(), "offsets");
  const BagLayout layout = checked_layout(ids, starts, num_features);
  for (const int64_t f : features)
    if (f < 0 || f >= num_features)
      throw py::value_error(message("features: expected 0 to ", num_features - 1, ", got ", f));
  const Tensor out_ids = view(out_indices.ptr(), "out_indices", ids.dtype, 1),
               out_starts = view(out_offsets.ptr(), "out_offsets", DType::i64, 1);
  check_output(out_ids, "out_indices");
  check_output(out_starts, "out_offsets");
  const bool weighted = !per_sample_weights.is_none();
  Tensor weights{}, out_psw{};
  if (weighted) {
    weights = view(per_sample_weights.ptr(), "per_sample_weights", DType::f32, 1);
    out_psw = view(out_weights.ptr(), "out_weights", DType::f32, 1);
    check_output(out_psw, "out_weights");
    if (weights.shape[0] != ids.shape[0])
      throw py::value_error(message("per_sample_weights: expected as many as indices, ", ids.shape[0],
                                    ", got ", weights.shape[0]));
  }
  SelectedBags chosen;
  select_features(integers(ids), integers(starts), weighted ? weights.ptr<float>() : nullptr, features,
                  layout.bags_each, chosen);
  if (out_starts.shape[0] != chosen.offsets.size)
    throw py::value_error(
        message("out_offsets: expected ", chosen.offsets.size, " entries, got ", out_starts.shape[0]));
  const int64_t total = chosen.indices.size;
  if (total > (weighted ? std::min(out_ids.shape[0], out_psw.shape[0]) : out_ids.shape[0]))
    throw py::value_error(message("out_indices, out_weights: no room for ", total, " entries"));
  if (total) std::memcpy(out_ids.data, chosen.index_bytes.data(), chosen.index_bytes.size());
  if (total && weighted) std::memcpy(out_psw.data, chosen.weights.data(), total * sizeof(float));
  std::memcpy(out_starts.data, chosen.starts.data(), chosen.starts.size() * sizeof(int64_t));
  return total;
}

void check_offsets_of(py::handle offsets, int64_t num_indices, bool include_last_offset,
                      int64_t num_features) {
  const Integers starts = integers(view_ids(offsets.ptr(), "offsets"));
  const int64_t bags = starts.size - include_last_offset;
  if (num_features < 1 || bags < 0 || bags % num_features)
    throw OffsetsError(message("offsets: expected a multiple of the number of features, ", num_features,
                               include_last_offset ? ", and one more" : "", ", got ", starts.size));
  check_offsets(starts, num_indices, BagLayout{num_features, bags / num_features});
}

void check_ids_of(py::handle indices, py::handle offsets, int64_t bags, int64_t num_features,
                  const std::vector<std::pair<int64_t, int64_t>>& bounds) {
  const Integers ids = integers(view_ids(indices.ptr(), "indices")),
                 starts = integers(view_ids(offsets.ptr(), "offsets"));
  const bool too_many = bags > starts.size || (bags > 0 && num_features > starts.size);
  const int64_t last = too_many ? -1 : starts.size - bags * num_features;
  if (num_features < 1 || bags < 0 || (last != 0 && last != 1))
    throw OffsetsError(
        message("offsets: expected ", num_features, " times ", bags, " or one more, got ", starts.size));
  for (const auto& [feature, bound] : bounds)
    if (feature < 0 || feature >= num_features)
      throw py::value_error(message("bounds: expected features 0 to ", num_features - 1, ", got ", feature));
  const BagLayout layout = BagLayout{num_features, bags};
  check_offsets(starts, ids.size, layout);
  check_ids(ids, starts, layout, bounds);
}

double unique_share(py::handle indices, py::handle offsets, int64_t num_features) {
  const Tensor ids = view_ids(indices.ptr(), "indices"), starts = view_ids(offsets.ptr(), "offsets");
  const int64_t batch = batch_of(starts, num_features), n = ids.shape[0];
  if (n == 0) return 1.0;
  double distinct = 0;
  int64_t begin = 0;
  for (int64_t t = 1; t <= num_features; ++t) {  // the bags within a feature do not matter
    const int64_t end = offset(starts, t * batch);
    if (end < begin || end > n)
      throw OffsetsError(message("offsets[", t * batch, "] is ", end, ", expected ", begin, " to ", n));
    distinct += ids.dtype == DType::i64 ? count_distinct(ids.ptr<int64_t>() + begin, end - begin)
                                        : count_distinct(ids.ptr<int32_t>() + begin, end - begin);
    begin = end;
  }
  return std::min(distinct / static_cast<double>(n), 1.0);
}

}  // namespace

void bind_csr(py::module_& m) {
  m.def("select_features", &select_features_into, py::arg("indices"), py::arg("offsets"),
        py::arg("per_sample_weights"), py::arg("features"), py::arg("num_features"), py::arg("out_indices"),
        py::arg("out_offsets"), py::arg("out_weights"),
        "Copies the bags of some features of a feature-major batch; returns their number of indices.");
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
}

}  // namespace mprec::python
