#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/error.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/make_tensor.h"
#include "python/tensor.h"
#include "serving/join.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

py::tuple join_bags(const py::list& indices, const py::list& offsets, const std::vector<int64_t>& samples,
                    const std::vector<int64_t>& starts, const std::vector<int64_t>& stops, int64_t features) {
  const size_t count = indices.size();
  if (!count || offsets.size() != count || samples.size() != count || starts.size() != count ||
      stops.size() != count)
    throw py::value_error("indices, offsets, samples, starts, stops: expected equally many, at least one");
  std::vector<serving::Part> parts;
  for (size_t i = 0; i < count; ++i)
    parts.push_back({integers(view_ids(py::object(indices[i]).ptr(), "indices")),
                     integers(view_ids(py::object(offsets[i]).ptr(), "offsets")), samples[i], starts[i],
                     stops[i]});
  const serving::Joined joined = serving::measure(parts, features);
  const auto dtype = [](bool wide) { return wide ? DType::i64 : DType::i32; };
  const py::object ids = make_tensor(joined.ids, dtype(joined.wide_ids));
  const py::object ends = make_tensor(features * joined.samples + 1, dtype(joined.wide_offsets));
  serving::join(parts, features, joined, view_ids(ids.ptr(), "indices").data,
                view_ids(ends.ptr(), "offsets").data);
  return py::make_tuple(ids, ends);
}

}  // namespace

void bind_batches(py::module_& m) {
  m.def("join_bags", &join_bags, py::arg("indices"), py::arg("offsets"), py::arg("samples"),
        py::arg("starts"), py::arg("stops"), py::arg("features"),
        "(indices, offsets) of samples starts[i] to stops[i] of feature-major batch i, of all batches in "
        "order.\n"
        "int32 where all of them are, int64 otherwise.");
}

}  // namespace mprec::python
