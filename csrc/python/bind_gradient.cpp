#include <vector>

#include "gradient/gradient.h"
#include "python/bags.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

py::object tuple_of(py::handle sequence) {
  auto tuple = py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr()));
  if (!tuple) throw py::error_already_set();
  return tuple;
}

// The optimizer's state of table t, [rows, dim] or [rows, 1].
Tensor state(const py::object& states, Py_ssize_t t, const char* name, const Tensor& weight, Rule rule) {
  const Tensor s = float_matrix(PyTuple_GET_ITEM(states.ptr(), t), name);
  const int64_t columns = rule == Rule::rowwise_adagrad ? 1 : weight.shape[1];
  if (s.shape[0] != weight.shape[0] || s.shape[1] != columns)
    throw py::value_error(message(name, "[", t, "]: expected [", weight.shape[0], ", ", columns, "], got [",
                                  s.shape[0], ", ", s.shape[1], "]"));
  check_output(s, name);
  return s;
}

void update_tables(py::object weights, py::object first, py::object second, py::handle indices,
                   py::handle offsets, py::handle per_sample_weights, py::handle mode, int64_t padding_idx,
                   py::handle grad, py::object columns, int rule_number, float lr, float eps, float beta1,
                   float beta2, int threads) {
  if (rule_number < 0 || rule_number > 4)
    throw py::value_error(message("rule: expected 0 to 4, got ", rule_number));
  const Rule rule = static_cast<Rule>(rule_number);
  const bool needs_first = rule > Rule::sgd, needs_second = rule == Rule::adam;
  weights = tuple_of(weights);
  const Py_ssize_t tables = PyTuple_GET_SIZE(weights.ptr());
  if (tables == 0) throw py::value_error("weights: expected at least one table");
  for (auto [needed, name, states] :
       {std::tuple{needs_first, "first", &first}, {needs_second, "second", &second}})
    if (needed) {
      *states = tuple_of(*states);
      if (PyTuple_GET_SIZE(states->ptr()) != tables)
        throw py::value_error(
            message(name, ": expected ", tables, " tensors, got ", PyTuple_GET_SIZE(states->ptr())));
    }
  if (!columns.is_none()) {
    columns = tuple_of(columns);
    if (PyTuple_GET_SIZE(columns.ptr()) != tables)
      throw py::value_error(message("columns: expected ", tables, ", got ", PyTuple_GET_SIZE(columns.ptr())));
  }

  const Tensor g = float_matrix(grad.ptr(), "grad");
  const int64_t bags = g.shape[0];
  BagRequest r{};
  r.indices = integers(view_ids(indices.ptr(), "indices"));
  r.offsets = integers(view_ids(offsets.ptr(), "offsets"));
  if (r.offsets.size != tables * bags && r.offsets.size != tables * bags + 1)
    throw OffsetsError(message("offsets: expected ", tables * bags, " or one more for grad of ", bags,
                               " bags, got ", r.offsets.size));
  r.mode = parse_mode(mode.ptr());
  r.per_sample_weights = parse_weights(per_sample_weights.ptr(), r.indices, r.mode);
  r.padding_idx = tables == 1 ? padding_idx : -1;
  r.num_features = tables;
  r.num_bags = tables * bags;

  std::vector<Feature> features(tables + 1);
  std::vector<TableRows> rows(tables);
  int64_t column = 0;
  for (Py_ssize_t t = 0; t < tables; ++t) {
    const Tensor w = float_matrix(PyTuple_GET_ITEM(weights.ptr(), t), "weights");
    if (!columns.is_none()) column = integer(PyTuple_GET_ITEM(columns.ptr(), t), "columns");
    columns_within(column, w.shape[1], g.shape[1], "grad");
    check_output(w, "weights");
    features[t] = feature(w, t * bags, g, column);
    column += w.shape[1];
    rows[t] = {w.ptr<float>(), nullptr, nullptr, w.strides[0], 0};
    if (needs_first) {
      const Tensor s = state(first, t, "first", w, rule);
      rows[t].first = s.ptr<float>();
      rows[t].state_stride = s.strides[0];
    }
    if (needs_second) {
      const Tensor s = state(second, t, "second", w, rule);
      rows[t].second = s.ptr<float>();
      if (s.strides[0] != rows[t].state_stride)
        throw py::value_error(message("second[", t, "]: expected the strides of first[", t, "]"));
    }
  }
  features[tables].first_bag = r.num_bags;
  r.features = features.data();
  py::gil_scoped_release release;
  mprec::update_tables(r, rows.data(), {rule, lr, eps, beta1, beta2}, checked_threads(threads));
}

int64_t sparse_gradient(py::handle indices, py::handle offsets, py::handle per_sample_weights,
                        py::handle mode, int64_t padding_idx, int64_t num_rows, py::handle grad,
                        py::handle rows, py::handle values, int threads) {
  const Tensor g = float_matrix(grad.ptr(), "grad");
  BagRequest r{};
  r.indices = integers(view_ids(indices.ptr(), "indices"));
  r.offsets = integers(view_ids(offsets.ptr(), "offsets"));
  r.mode = parse_mode(mode.ptr());
  r.per_sample_weights = parse_weights(per_sample_weights.ptr(), r.indices, r.mode);
  r.padding_idx = padding_idx;
  r.num_features = 1;
  r.num_bags = g.shape[0];
  if (r.offsets.size != r.num_bags && r.offsets.size != r.num_bags + 1)
    throw OffsetsError(message("offsets: expected ", r.num_bags, " or one more for grad of ", r.num_bags,
                               " bags, got ", r.offsets.size));
  const Tensor found = view(rows.ptr(), "rows", DType::i64, 1);
  const Tensor out = view(values.ptr(), "values", DType::f32, 2);
  if (found.shape[0] < r.indices.size || out.shape[0] < r.indices.size || out.shape[1] != g.shape[1])
    throw py::value_error(message("rows, values: expected room for ", r.indices.size, " rows of ", g.shape[1],
                                  " columns, got ", found.shape[0], " and [", out.shape[0], ", ",
                                  out.shape[1], "]"));
  check_output(found, "rows");
  check_output(out, "values");
  Feature features[2] = {};
  features[0].num_rows = num_rows;
  features[0].dim = g.shape[1];
  features[0].out = g.ptr<float>();
  features[0].out_stride = g.strides[0];
  features[1].first_bag = r.num_bags;
  r.features = features;
  py::gil_scoped_release release;
  return mprec::sparse_gradient(r, found.ptr<int64_t>(), out.ptr<float>(), checked_threads(threads));
}

}  // namespace

void bind_gradient(py::module_& m) {
  m.def("update_tables", &update_tables, py::arg("weights"), py::arg("first"), py::arg("second"),
        py::arg("indices"), py::arg("offsets"), py::arg("per_sample_weights"), py::arg("mode"),
        py::arg("padding_idx"), py::arg("grad"), py::arg("columns"), py::arg("rule"), py::arg("lr"),
        py::arg("eps"), py::arg("beta1"), py::arg("beta2"), py::arg("threads"),
        "Applies an optimizer to the rows that the bags use, given the gradient of their pooled output.");
  m.def("sparse_gradient", &sparse_gradient, py::arg("indices"), py::arg("offsets"),
        py::arg("per_sample_weights"), py::arg("mode"), py::arg("padding_idx"), py::arg("num_rows"),
        py::arg("grad"), py::arg("rows"), py::arg("values"), py::arg("threads"),
        "Writes one table's coalesced gradient and returns its number of rows.");
}

}  // namespace mprec::python
