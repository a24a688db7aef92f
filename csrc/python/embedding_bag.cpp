#include "embedding_bag/embedding_bag.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "common/error.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Below this cost (cache lines) a call is over sooner than another thread could make use of the GIL.
constexpr int64_t release_gil_cost = 2048;

void check_out(const Tensor& out, int64_t bags, int64_t columns) {
  if (out.shape[0] != bags)
    throw py::value_error(
        message("out: expected one row for each of the ", bags, " bags, got ", out.shape[0]));
  if (out.shape[1] < columns)
    throw py::value_error(message("out: expected at least ", columns, " columns, got ", out.shape[1]));
}

void run(const BagRequest& request, int threads) {
  std::optional<py::gil_scoped_release> release;
  if (embedding_bag_cost(request) >= release_gil_cost) release.emplace();
  embedding_bag_forward(request, threads);
}

PyObject* embedding_bag_multi(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* names[] = {"weights", "indices",     "offsets", "per_sample_weights",
                                            "mode",    "padding_idx", "out",     "out_columns",
                                            "threads"};
    const Arguments<9> a("embedding_bag_multi", names, args, count, keywords);
    // Owned: the tables must outlive the call even if another thread empties the list.
    const auto weights = py::reinterpret_steal<py::object>(PySequence_Tuple(a[0]));
    if (!weights) throw py::error_already_set();
    const Py_ssize_t tables = PyTuple_GET_SIZE(weights.ptr());
    if (tables == 0) throw py::value_error("weights: expected at least one table");
    const Integers indices = integers(view_ids(a[1], "indices")),
                   offsets = integers(view_ids(a[2], "offsets"));
    if (offsets.size % tables != 1 % tables)
      throw OffsetsError(message("offsets: expected 1 + a multiple of the number of tables, ", tables,
                                 ", got ", offsets.size));
    if (offsets.size == 0) throw OffsetsError("offsets: expected at least 1, got 0");
    const int64_t batch = (offsets.size - 1) / tables;
    const Mode mode = parse_mode(a[4]);
    const Tensor out = matrix(a[6], "out");
    py::object columns;
    if (a[7] != Py_None) {
      columns = py::reinterpret_steal<py::object>(PySequence_Fast(a[7], "out_columns: expected a list"));
      if (!columns) throw py::error_already_set();
      if (PySequence_Fast_GET_SIZE(columns.ptr()) != tables)
        throw py::value_error(
            message("out_columns: expected ", tables, ", got ", PySequence_Fast_GET_SIZE(columns.ptr())));
    }

    std::vector<Feature> features(tables + 1);
    int64_t column = 0;
    for (Py_ssize_t t = 0; t < tables; ++t) {
      const Tensor weight = matrix(PyTuple_GET_ITEM(weights.ptr(), t), "weights");
      if (columns) column = integer(PySequence_Fast_GET_ITEM(columns.ptr(), t), "out_columns");
      if (column < 0) throw py::value_error(message("out_columns[", t, "]: expected >= 0, got ", column));
      features[t] = feature(weight, t * batch, out, column);
      column += weight.shape[1];
      check_out(out, batch, column);
    }
    features[tables].first_bag = tables * batch;
    const int64_t padding_idx = tables == 1 ? integer(a[5], "padding_idx") : -1;
    run({indices, offsets, features.data(), tables, tables * batch, parse_weights(a[3], indices, mode), mode,
         padding_idx},
        static_cast<int>(integer(a[8], "threads")));
  });
}

PyObject* embedding_bag(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* names[] = {
        "weight",      "indices", "offsets", "per_sample_weights", "mode", "include_last_offset",
        "padding_idx", "out",     "threads"};
    const Arguments<9> a("embedding_bag", names, args, count, keywords);
    const Tensor weight = matrix(a[0], "weight"), out = matrix(a[7], "out");
    const Integers indices = integers(view_ids(a[1], "indices")),
                   offsets = integers(view_ids(a[2], "offsets"));
    const Mode mode = parse_mode(a[4]);
    const int include_last = PyObject_IsTrue(a[5]);
    if (include_last < 0) throw py::error_already_set();
    if (include_last && offsets.size == 0)
      throw OffsetsError("offsets: expected at least 1 (include_last_offset is set), got 0");
    const int64_t bags = offsets.size - include_last;
    if (bags == 0 && indices.size > 0)
      throw OffsetsError(message("offsets: describe no bags, but there are ", indices.size, " indices"));
    check_out(out, bags, weight.shape[1]);
    Feature features[2] = {feature(weight, 0, out, 0), {}};
    features[1].first_bag = bags;
    run({indices, offsets, features, 1, bags, parse_weights(a[3], indices, mode), mode,
         integer(a[6], "padding_idx")},
        static_cast<int>(integer(a[8], "threads")));
  });
}

template <auto function>
PyCFunction fastcall() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"embedding_bag_multi", fastcall<&embedding_bag_multi>(), METH_FASTCALL | METH_KEYWORDS,
     "embedding_bag_multi(weights, indices, offsets, per_sample_weights, mode, padding_idx, out, "
     "out_columns, "
     "threads)\n\nPools every table's bags into its columns of out [B, total]."},
    {"embedding_bag", fastcall<&embedding_bag>(), METH_FASTCALL | METH_KEYWORDS,
     "embedding_bag(weight, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, "
     "out, "
     "threads)\n\nPools one table's bags into out [B, D]."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_embedding_bag(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace mprec::python
