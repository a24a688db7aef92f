#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "bags/check.h"
#include "bags/select.h"
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

  Output(PyObject* object, int ndim, Sign sign)
      : tensor(ndim == 2 ? matrix(object, "out", sign) : view(object, "out", sign)) {
    if (tensor.ndim != ndim || (ndim == 1 && !tensor.contiguous()))
      throw NotTaken(NotTaken::value,
                     message("out: expected ", ndim, " dimension(s), contiguous, got ", tensor.ndim));
    const auto plain = plain_format(tensor.dtype);
    if (!plain)
      throw NotTaken(NotTaken::type,
                     message("out: expected float32, float16 or bfloat16, got ", dtype_name(tensor.dtype)));
    format = *plain;
    item = format == Format::f32 ? 4 : 2;
    check_output(tensor, "out");
  }

  // Writing must not change what is read.
  void check_apart_from(const Tensor* tables, size_t count, const Integers& indices, const Integers& offsets,
                        const float* weights) const {
    const Extent written(tensor);
    bool meets = written.meets(Extent(vector_of(indices))) || written.meets(Extent(vector_of(offsets)));
    if (weights)
      meets |=
          written.meets(Extent({const_cast<float*>(weights), DType::f32, 1, {indices.size}, {1}, false}));
    for (size_t t = 0; t < count; ++t) meets |= written.meets(Extent(tables[t]));
    if (meets) throw NotTaken(NotTaken::value, "out: shares memory with what is read");
  }

  // Rows 0 to bags, from `column` on. Returns the columns taken.
  Columns place_columns(Feature& f, int64_t bags, int64_t column) const {
    if (tensor.shape[0] != bags)
      throw NotTaken(NotTaken::value,
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

// `out`, or a new matrix of the tables' type (float32 of quantised ones).
py::object out_or_new(PyObject* out, int64_t bags, int64_t width, DType dtype) {
  if (out != Py_None) return py::reinterpret_borrow<py::object>(out);
  return empty_matrix(bags, width, dtype == DType::u8 ? DType::f32 : dtype);
}

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

// Some features of the batch, if any are named: `features` is None, or names one of `num_features` features
// for each of `tables` tables. Offsets of the whole batch are checked then.
struct Served {
  Integers indices, offsets;
  const float* weights;
  std::vector<int64_t> features;  // empty: all
  BagLayout whole{};

  Served(PyObject* named, PyObject* of, Py_ssize_t tables, const Integers& all, const Integers& starts,
         const float* psw)
      : indices(all), offsets(starts), weights(psw) {
    const PerTable list(named, "features", tables);
    if (!list) return;
    const int64_t count = integer(of, "num_features");
    if (count < 1) throw py::value_error(message("num_features: expected at least 1, got ", count));
    if (starts.size < 1 || (starts.size - 1) % count != 0)
      throw OffsetsError(message("offsets: expected 1 + a multiple of the number of features, ", count,
                                 ", got ", starts.size));
    bool as_they_are = tables == count;
    for (Py_ssize_t t = 0; t < tables; ++t) {
      features.push_back(list.up_to(count - 1, t));
      as_they_are &= features.back() == t;
    }
    if (as_they_are) {
      features.clear();
      return;
    }
    whole = BagLayout{count, (starts.size - 1) / count};
    check_offsets(starts, all.size, whole);
    static thread_local SelectedBags selected;
    select_features(all, starts, psw, features, whole.bags_each, selected);
    indices = selected.indices;
    offsets = selected.offsets;
    if (psw) weights = selected.weights.data();
  }
};

template <bool strict>
PyObject* embedding_bag_multi(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object<strict>([&]() -> py::object {
    static constexpr const char* names[] = {
        "weights",     "indices", "offsets", "per_sample_weights", "mode",     "padding_idx", "out",
        "out_columns", "threads", "bits",    "batch_sizes",        "features", "num_features"};
    const Arguments<13, 9> a("embedding_bag_multi", names, args, count, keywords);
    // Owned: the tables must outlive the call even if another thread empties the list.
    const auto weights = py::reinterpret_steal<py::object>(PySequence_Tuple(a[0]));
    if (!weights) throw py::error_already_set();
    const Py_ssize_t tables = PyTuple_GET_SIZE(weights.ptr());
    if (tables == 0) throw py::value_error("weights: expected at least one table");
    const Integers all = integers(view_ids(a[1], "indices")), starts = integers(view_ids(a[2], "offsets"));
    const Mode mode = parse_mode(a[4]);
    const PerTable columns(a[7], "out_columns", tables), bits(a[9], "bits", tables),
        batch_sizes(a[10], "batch_sizes", tables);
    if (starts.size == 0) throw OffsetsError("offsets: expected at least 1, got 0");
    if (batch_sizes && columns) throw py::value_error("out_columns: not with batch_sizes");
    const float* const psw = parse_weights(a[3], all, mode);
    const Served served(a[11], a[12], tables, all, starts, psw);
    const Integers &indices = served.indices, &offsets = served.offsets;
    if (!batch_sizes && (offsets.size - 1) % tables != 0)
      throw OffsetsError(message("offsets: expected 1 + a multiple of the number of tables, ", tables,
                                 ", got ", offsets.size));

    std::vector<Feature> features(tables + 1);
    std::vector<Tensor> views;
    views.reserve(tables);
    int64_t width = 0;
    for (Py_ssize_t t = 0; t < tables; ++t) {
      views.push_back(matrix(PyTuple_GET_ITEM(weights.ptr(), t), "weights", Sign::remember));
      features[t] = table(views.back(), "weights", bits[t]);
      width += features[t].dim;
    }
    const int64_t each = (offsets.size - 1) / tables;
    const py::object result = out_or_new(a[6], each, width, views[0].dtype);
    const bool given = a[6] != Py_None;
    const Output out(result.ptr(), batch_sizes ? 1 : 2, given ? Sign::ask : Sign::ignore);
    if (given) {
      out.check_apart_from(views.data(), views.size(), all, starts, psw);
    }
    std::vector<Columns> blocks;
    int64_t place = 0, bags = 0;
    for (Py_ssize_t t = 0; t < tables; ++t) {
      Feature& f = features[t];
      f.first_bag = bags;
      const int64_t batch = batch_sizes ? batch_sizes.up_to(offsets.size, t) : each;
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
    const BagRequest request{indices,        offsets, features.data(), tables, bags,
                             served.weights, mode,    padding_idx};
    try {
      run(request, checked_threads(integer(a[8], "threads")));
    } catch (const IdError&) {  // says where in the whole batch
      std::vector<std::pair<int64_t, int64_t>> bounds;
      for (size_t t = 0; t < served.features.size(); ++t)
        bounds.emplace_back(served.features[t], features[t].num_rows);
      if (!bounds.empty()) check_ids(all, starts, served.whole, bounds);
      throw;
    }
    if (given) count_write(result.ptr());
    return result;
  });
}

template <bool strict>
PyObject* embedding_bag(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object<strict>([&]() -> py::object {
    static constexpr const char* names[] = {
        "weight", "indices", "offsets", "per_sample_weights", "mode", "include_last_offset", "padding_idx",
        "out",    "threads", "bits"};
    const Arguments<10, 9> a("embedding_bag", names, args, count, keywords);
    const Tensor weight = matrix(a[0], "weight", Sign::remember);
    Feature features[2] = {table(weight, "weight", a[9]), {}};
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
    const float* const psw = parse_weights(a[3], indices, mode);
    const py::object result = out_or_new(a[7], bags, features[0].dim, weight.dtype);
    const bool given = a[7] != Py_None;
    const Output out(result.ptr(), 2, given ? Sign::ask : Sign::ignore);
    if (given) {
      out.check_apart_from(&weight, 1, indices, offsets, psw);
    }
    out.place_columns(features[0], bags, 0);
    features[1].first_bag = bags;
    run({indices, offsets, features, 1, bags, psw, mode, integer(a[6], "padding_idx")},
        checked_threads(integer(a[8], "threads")));
    if (given) count_write(result.ptr());
    return result;
  });
}

constexpr const char multi_doc[] =
    "embedding_bag_multi(weights, indices, offsets, per_sample_weights, mode, padding_idx, out, out_columns, "
    "threads,\n                    bits=None, batch_sizes=None, features=None, num_features=None)\n\n"
    "Pools every table's bags into its columns of out [B, total] (None: a new tensor), which is returned. "
    "bits: 8 or 4 for each uint8 table. batch_sizes: bags of each table, if they differ; out is "
    "one-dimensional then, the tables' [B_t, D_t] one after another. features: which of the batch's "
    "num_features features each table serves (None: all, in order). try_...: None for tensors in a form "
    "that this does not take.";
constexpr const char single_doc[] =
    "embedding_bag(weight, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, "
    "out, "
    "threads,\n              bits=None)\n\n"
    "Pools one table's bags into out [B, D] (None: a new tensor), which is returned. try_...: None for "
    "tensors "
    "in a form that this does not take.";

constexpr int flags = METH_FASTCALL | METH_KEYWORDS;
PyMethodDef methods[] = {
    {"embedding_bag_multi", fastcall<&embedding_bag_multi<true>>(), flags, multi_doc},
    {"try_embedding_bag_multi", fastcall<&embedding_bag_multi<false>>(), flags, multi_doc},
    {"embedding_bag", fastcall<&embedding_bag<true>>(), flags, single_doc},
    {"try_embedding_bag", fastcall<&embedding_bag<false>>(), flags, single_doc},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_embedding_bag(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace mprec::python
