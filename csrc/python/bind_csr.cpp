// What is done to a feature-major batch before kernels see it: bags of some features are copied out, so that
// one kernel call can serve them; distinct IDs are counted, so that their share can be acted on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/distinct.h"
#include "common/error.h"
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

void check_offsets(const Tensor& offsets, int64_t num_indices) {
  const int64_t last = offsets.shape[0] - 1;
  if (offset(offsets, 0) != 0)
    throw OffsetsError(message("offsets[0] is ", offset(offsets, 0), ", expected 0"));
  for (int64_t i = 1; i <= last; ++i)
    if (offset(offsets, i) < offset(offsets, i - 1))
      throw OffsetsError(message("offsets[", i, "] is ", offset(offsets, i), ", below offsets[", i - 1,
                                 "] = ", offset(offsets, i - 1)));
  if (offset(offsets, last) != num_indices)
    throw OffsetsError(message("offsets[", last, "] is ", offset(offsets, last),
                               ", expected the number of indices, ", num_indices));
}

// Writes the features' indices (and per-sample weights) one feature after the other, and their offsets;
// returns the number of indices.
int64_t select_features(py::handle indices, py::handle offsets, py::handle per_sample_weights,
                        const std::vector<int64_t>& features, int64_t num_features, py::handle out_indices,
                        py::handle out_offsets, py::handle out_weights) {
  const Tensor ids = view_ids(indices.ptr(), "indices"), starts = view_ids(offsets.ptr(), "offsets");
  const int64_t count = static_cast<int64_t>(features.size());
  const int64_t batch = batch_of(starts, num_features);
  check_offsets(starts, ids.shape[0]);
  const Tensor out_ids = view(out_indices.ptr(), "out_indices", ids.dtype, 1),
               out_starts = view(out_offsets.ptr(), "out_offsets", DType::i64, 1);
  check_output(out_ids, "out_indices");
  check_output(out_starts, "out_offsets");
  if (out_starts.shape[0] != count * batch + 1)
    throw py::value_error(
        message("out_offsets: expected ", count * batch + 1, " entries, got ", out_starts.shape[0]));
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
  const int64_t room = weighted ? std::min(out_ids.shape[0], out_psw.shape[0]) : out_ids.shape[0];
  const size_t width = ids.dtype == DType::i64 ? 8 : 4;
  int64_t total = 0, bag = 0;
  for (const int64_t f : features) {
    if (f < 0 || f >= num_features)
      throw py::value_error(message("features: expected 0 to ", num_features - 1, ", got ", f));
    const int64_t begin = offset(starts, f * batch), n = offset(starts, (f + 1) * batch) - begin;
    if (total + n > room)
      throw py::value_error(message("out_indices, out_weights: no room for ", total + n, " entries"));
    if (n) {
      std::memcpy(out_ids.ptr<char>() + total * width, ids.ptr<char>() + begin * width, n * width);
      if (weighted)
        std::memcpy(out_psw.ptr<float>() + total, weights.ptr<float>() + begin, n * sizeof(float));
    }
    for (int64_t b = 0; b < batch; ++b)
      out_starts.ptr<int64_t>()[bag++] = offset(starts, f * batch + b) - begin + total;
    total += n;
  }
  out_starts.ptr<int64_t>()[bag] = total;
  return total;
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
  m.def("select_features", &select_features, py::arg("indices"), py::arg("offsets"),
        py::arg("per_sample_weights"), py::arg("features"), py::arg("num_features"), py::arg("out_indices"),
        py::arg("out_offsets"), py::arg("out_weights"),
        "Copies the bags of some features of a feature-major batch; returns their number of indices.");
  m.def("unique_share", &unique_share, py::arg("indices"), py::arg("offsets"), py::arg("num_features"),
        "Distinct IDs of each feature over all IDs of a feature-major batch (see count_distinct in "
        "common/distinct.h); 1 of an empty one.");
}

}  // namespace mprec::python
