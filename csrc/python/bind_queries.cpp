// Queries in JSON, read without Python's lock.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "common/error.h"
#include "python/arguments.h"
#include "python/tensor.h"
#include "serving/query.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Bytes: for less, giving the lock away and back costs as much as reading.
constexpr size_t min_unlocked = 4096;

py::object read_json_query(const py::bytes& body, py::handle vocabularies, int64_t num_dense,
                           int64_t max_samples, int64_t max_ids) {
  const Tensor bounds = view(vocabularies.ptr(), "vocabularies", DType::i64, 1);
  if (num_dense < 0) throw py::value_error(message("num_dense: expected at least 0, got ", num_dense));
  const QueryShape shape{bounds.ptr<int64_t>(), bounds.shape[0], num_dense, max_samples, max_ids};
  const std::string_view text = body;
  Query query;
  if (!without_gil(text.size() >= min_unlocked, [&] { return read_query(text, shape, query); }))
    return py::none();
  const auto count = static_cast<int64_t>(query.ids.size());
  const py::object ids = new_tensor({count}, DType::i64);
  const py::object offsets = new_tensor({shape.features * query.samples + 1}, DType::i64);
  const py::object dense = new_tensor({query.samples * num_dense}, DType::f32);
  write_bags(query, shape.features, view_ids(ids.ptr(), "ids").ptr<int64_t>(),
             view_ids(offsets.ptr(), "offsets").ptr<int64_t>());
  std::copy(query.dense.begin(), query.dense.end(), view(dense.ptr(), "dense").ptr<float>());
  return py::make_tuple(query.samples, dense, ids, offsets, query.sla_ms);
}

}  // namespace

void bind_queries(py::module_& m) {
  m.def("read_json_query", &read_json_query, py::arg("body"), py::arg("vocabularies"), py::arg("num_dense"),
        py::arg("max_samples"), py::arg("max_ids"),
        "(samples, dense float32 [samples * num_dense], ids int64, offsets int64, sla_ms or 0) of a query in "
        "JSON,\nfeature-major; None for whatever is wrong with it or is not the common form.\n"
        "vocabularies: int64 [features].");
}

}  // namespace mprec::python
