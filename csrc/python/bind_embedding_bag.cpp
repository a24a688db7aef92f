#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "common/error.h"
#include "embedding_bag/embedding_bag.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Below this cost (cache lines) a call is over sooner than another thread could make use of the GIL.
constexpr int64_t release_gil_cost = 2048;

// Where results go: float32, float16 or bfloat16.
struct Output {
  Tensor tensor;
  Format format;
  int64_t item;  // bytes

  Output(PyObject* object, int ndim) : tensor(ndim == 2 ? matrix(object, "out") : view(object, "out")) {
    if (tensor.ndim != ndim || (ndim == 1 && !tensor.contiguous()))
      throw py::value_error(message("out: expected ", ndim, " dimension(s), contiguous, got ", tensor.ndim));
    const auto plain = plain_format(tensor.dtype);
    if (!plain)
      throw py::type_error(
          message("out: expected float32, float16 or bfloat16, got ", dtype_name(tensor.dtype)));
    format = *plain;
    item = format == Format::f32 ? 4 : 2;
    check_output(tensor, "out");
  }

  // Rows 0 to bags, from `column` on. Returns the columns taken.
  Columns place_columns(Feature& f, int64_t bags, int64_t column) const {
    if (tensor.shape[0] != bags)
      throw py::value_error(
          message("out: expected one row for each of the ", bags, " bags, got ", tensor.shape[0]));
    const Columns columns = columns_within(column, f.dim, tensor.shape[1], "out");
    put(f, column, tensor.strides[0]);
    return columns;
  }
  // [bags, dim] side by side, from `element` on.
  void place_block(Feature& f, int64_t bags, int64_t element) const {
    if (bags > 0 && f.dim > (tensor.shape[0] - element) / bags)  // bags * dim might overflow
      throw py::value_error(message("out: expected at least ", element + static_cast<double>(bags) * f.dim,
                                    " elements, got ", tensor.shape[0]));
    put(f, element, f.dim);
  }

 private:
  void put(Feature& f, int64_t element, int64_t stride) const {
    f.out = reinterpret_cast<float*>(tensor.ptr<char>() + element * item);
    f.out_stride = stride;
    f.out_format = format;
  }
};

void run(const BagRequest& request, int threads) {
  std::optional<py::gil_scoped_release> release;
  if (embedding_bag_cost(request) >= release_gil_cost) release.emplace();
  embedding_bag_forward(request, threads);
}

// A Python list or tuple of one entry for each table; None gives null.
class PerTable {
 public:
  PerTable(PyObject* object, const char* name, Py_ssize_t tables) : name_(name) {
    if (object == Py_None) return;
    items_ = py::reinterpret_steal<py::object>(
        PySequence_Fast(object, message(name, ": expected a list").c_str()));
    if (!items_) throw py::error_already_set();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items_.ptr());
    if (count != tables)
      throw py::value_error(message(name, ": expected one for each of the ", tables, " tables, got ", count));
  }
  explicit operator bool() const { return static_cast<bool>(items_); }
  PyObject* operator[](Py_ssize_t t) const {
    return items_ ? PySequence_Fast_GET_ITEM(items_.ptr(), t) : Py_None;
  }
  int64_t up_to(int64_t most, Py_ssize_t t) const {
    const int64_t value = integer((*this)[t], name_);
    if (value < 0) throw py::value_error(message(name_, "[", t, "]: expected >= 0, got ", value));
    if (value > most) throw py::value_error(message(name_, "[", t, "]: expected <= ", most, ", got ", value));
    return value;
  }

 private:
  const char* name_;
  py::object items_;
};

PyObject* embedding_bag_multi(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* names[] = {"weights", "indices",     "offsets",    "per_sample_weights",
                                            "mode",    "padding_idx", "out",        "out_columns",
                                            "threads", "bits",        "batch_sizes"};
    const Arguments<11, 9> a("embedding_bag_multi", names, args, count, keywords);
    // Owned: the tables must outlive the call even if another thread empties the list.
    const auto weights = py::reinterpret_steal<py::object>(PySequence_Tuple(a[0]));
    if (!weights) throw py::error_already_set();
    const Py_ssize_t tables = PyTuple_GET_SIZE(weights.ptr());
    if (tables == 0) throw py::value_error("weights: expected at least one table");
    const Integers indices = integers(view_ids(a[1], "indices")),
                   offsets = integers(view_ids(a[2], "offsets"));
    const Mode mode = parse_mode(a[4]);
    const PerTable columns(a[7], "out_columns", tables), bits(a[9], "bits", tables),
        batch_sizes(a[10], "batch_sizes", tables);
    if (offsets.size == 0) throw OffsetsError("offsets: expected at least 1, got 0");
    if (!batch_sizes && (offsets.size - 1) % tables != 0)
      throw OffsetsError(message("offsets: expected 1 + a multiple of the number of tables, ", tables,
                                 ", got ", offsets.size));
    if (batch_sizes && columns) throw py::value_error("out_columns: not with batch_sizes");
    const Output out(a[6], batch_sizes ? 1 : 2);

    std::vector<Feature> features(tables + 1);
    std::vector<Columns> blocks;
    int64_t place = 0, bags = 0;
    for (Py_ssize_t t = 0; t < tables; ++t) {
      Feature& f = features[t] = table(PyTuple_GET_ITEM(weights.ptr(), t), "weights", bits[t]);
      f.first_bag = bags;
      const int64_t batch = batch_sizes ? batch_sizes.up_to(offsets.size, t) : (offsets.size - 1) / tables;
      bags += batch;
      if (columns) place = columns.up_to(out.tensor.shape[1], t);
      if (batch_sizes) {
        out.place_block(f, batch, place);
        place += batch * f.dim;
      } else {
        const Columns taken = out.place_columns(f, batch, place);
        if (columns) blocks.push_back(taken);
        place += f.dim;
      }
    }
    check_apart(std::move(blocks), "out_columns");
    if (offsets.size != bags + 1)
      throw OffsetsError(message("offsets: expected 1 + the number of bags, ", bags, ", got ", offsets.size));
    features[tables].first_bag = bags;
    const int64_t padding_idx = tables == 1 ? integer(a[5], "padding_idx") : -1;
    run({indices, offsets, features.data(), tables, bags, parse_weights(a[3], indices, mode), mode,
         padding_idx},
        checked_threads(integer(a[8], "threads")));
  });
}

PyObject* embedding_bag(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    static constexpr const char* names[] = {
        "weight", "indices", "offsets", "per_sample_weights", "mode", "include_last_offset", "padding_idx",
        "out",    "threads", "bits"};
    const Arguments<10, 9> a("embedding_bag", names, args, count, keywords);
    Feature features[2] = {table(a[0], "weight", a[9]), {}};
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
    Output(a[7], 2).place_columns(features[0], bags, 0);
    features[1].first_bag = bags;
    run({indices, offsets, features, 1, bags, parse_weights(a[3], indices, mode), mode,
         integer(a[6], "padding_idx")},
        checked_threads(integer(a[8], "threads")));
  });
}

PyMethodDef methods[] = {
    {"embedding_bag_multi", fastcall<&embedding_bag_multi>(), METH_FASTCALL | METH_KEYWORDS,
     "embedding_bag_multi(weights, indices, offsets, per_sample_weights, mode, padding_idx, out, "
     "out_columns, threads,"
     "\n                    bits=None, batch_sizes=None)\n\n"
     "Pools every table's bags into its columns of out [B, total]. bits: 8 or 4 for each uint8 table. "
     "batch_sizes:\n"
     "bags of each table, if they differ; out is one-dimensional then, the tables' [B_t, D_t] one after "
     "another."},
    {"embedding_bag", fastcall<&embedding_bag>(), METH_FASTCALL | METH_KEYWORDS,
     "embedding_bag(weight, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, "
     "out, threads,"
     "\n              bits=None)\n\n"
     "Pools one table's bags into out [B, D]."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_embedding_bag(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace mprec::python
