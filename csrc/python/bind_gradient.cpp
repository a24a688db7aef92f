#include <limits>
#include <vector>

#include "gradient/gradient.h"
#include "python/bags.h"
#include "python/output.h"
#include "python/tables.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// A table to be updated.
Tensor updated(PyObject* object, Rule rule) {
  const Tensor w = matrix(object, "weights");
  if (rule == Rule::assign ? w.dtype != DType::f32 : !plain_format(w.dtype))
    throw NotTaken(NotTaken::type,
                   message("weights: expected float32", rule == Rule::assign ? "" : ", float16 or bfloat16",
                           ", got ", dtype_name(w.dtype)));
  check_output(w, "weights");
  return w;
}

// The optimizer's state of table t, [rows, dim] or [rows, 1].
Tensor state(const List& states, Py_ssize_t t, const char* name, const Tensor& weight, Rule rule) {
  const Tensor s = float_matrix(states[t], name);
  const int64_t columns = rule == Rule::rowwise_adagrad ? 1 : weight.shape[1];
  check_shape(s, message(name, "[", t, "]").c_str(), {weight.shape[0], columns});
  check_output(s, name);
  return s;
}

// The bags that were pooled to what `grad` is the gradient of.
Bags pooled_bags(py::handle indices, py::handle offsets, py::handle per_sample_weights, py::handle mode,
                 int64_t padding_idx, int64_t num_features, const Tensor& grad) {
  Bags bags = read_bags(indices.ptr(), offsets.ptr());
  set_features_of(bags, num_features, grad.shape[0]);
  set_pooling(bags, mode.ptr(), per_sample_weights.ptr(), Py_None);
  if (num_features == 1) bags.padding_idx = padding_idx;
  return bags;
}

void update_tables(py::handle weights, py::handle first, py::handle second, py::handle indices,
                   py::handle offsets, py::handle per_sample_weights, py::handle mode, int64_t padding_idx,
                   py::handle grad, py::handle columns, int rule_number, float lr, float eps, float beta1,
                   float beta2, float keep, py::handle noise, int threads) {
  if (rule_number < 0 || rule_number > 4)
    throw py::value_error(message("rule: expected 0 to 4, got ", rule_number));
  const Rule rule = static_cast<Rule>(rule_number);
  const bool needs_first = rule > Rule::sgd, needs_second = rule == Rule::adam;
  const List tables(weights.ptr(), "weights");
  const Py_ssize_t count = tables.size();
  const List firsts(needs_first ? first.ptr() : Py_None, "first", count),
      seconds(needs_second ? second.ptr() : Py_None, "second", count),
      places(columns.ptr(), "columns", count), keys(noise.ptr(), "noise", count);
  if (needs_first > static_cast<bool>(firsts) || needs_second > static_cast<bool>(seconds))
    throw py::type_error(message(firsts ? "second" : "first", ": expected the rule's state, got None"));
  const Tensor g = matrix(grad.ptr(), "grad");
  const bool narrow = g.dtype == DType::f16 || g.dtype == DType::bf16;
  const Bags bags = pooled_bags(indices, offsets, per_sample_weights, mode, padding_idx, count, g);

  std::vector<PooledGradient> gradients(count);
  std::vector<TableRows> rows(count);
  int64_t column = 0;
  for (Py_ssize_t t = 0; t < count; ++t) {
    const Tensor w = updated(tables[t], rule);
    if (places) column = integer(places[t], "columns");
    if (g.dtype != DType::f32 && (!narrow || g.dtype != w.dtype))
      throw NotTaken(NotTaken::type, message("grad: expected float32 or the type of weights[", t, "], ",
                                             dtype_name(w.dtype), ", got ", dtype_name(g.dtype)));
    columns_within(column, w.shape[1], g.shape[1], "grad");
    gradients[t] = {g.ptr<char>() + column * g.item_bytes(), g.strides[0], w.shape[1], w.shape[0], narrow};
    column += w.shape[1];
    rows[t] = {w.data, nullptr, nullptr, w.strides[0], 0, *plain_format(w.dtype)};
    if (keys) {
      rows[t].stochastic = true;
      rows[t].noise = static_cast<uint64_t>(keys.up_to(std::numeric_limits<int64_t>::max(), t));
    }
    if (firsts) {
      const Tensor s = state(firsts, t, "first", w, rule);
      rows[t].first = s.ptr<float>();
      rows[t].state_stride = s.strides[0];
    }
    if (seconds) {
      const Tensor s = state(seconds, t, "second", w, rule);
      rows[t].second = s.ptr<float>();
      if (s.strides[0] != rows[t].state_stride)
        throw py::value_error(message("second[", t, "]: expected the strides of first[", t, "]"));
    }
  }
  checked_threads(threads);
  py::gil_scoped_release release;
  mprec::update_tables(bags, gradients.data(), rows.data(), {rule, lr, eps, beta1, beta2, keep}, threads);
}

int64_t sparse_gradient(py::handle indices, py::handle offsets, py::handle per_sample_weights,
                        py::handle mode, int64_t padding_idx, int64_t num_rows, py::handle grad,
                        py::handle rows, py::handle values, int threads) {
  const Tensor g = float_matrix(grad.ptr(), "grad");
  const Bags bags = pooled_bags(indices, offsets, per_sample_weights, mode, padding_idx, 1, g);
  const Tensor found = view(rows.ptr(), "rows", DType::i64, 1);
  const Tensor out = view(values.ptr(), "values", DType::f32, 2);
  if (found.shape[0] < bags.indices.size || out.shape[0] < bags.indices.size || out.shape[1] != g.shape[1])
    throw py::value_error(message("rows, values: expected room for ", bags.indices.size, " rows of ",
                                  g.shape[1], " columns, got ", found.shape[0], " and [", out.shape[0], ", ",
                                  out.shape[1], "]"));
  check_output(found, "rows");
  check_output(out, "values");
  checked_threads(threads);
  py::gil_scoped_release release;
  return mprec::sparse_gradient(bags, {g.ptr<float>(), g.strides[0], g.shape[1], num_rows},
                                found.ptr<int64_t>(), out.ptr<float>(), threads);
}

constexpr Signature<1> counted{"count_steps", {"steps"}};

py::object count_steps(const Arguments<1>& a) {
  const List steps(a[0], "steps");
  std::vector<Tensor> views;
  for (Py_ssize_t i = 0; i < steps.size(); ++i) {
    views.push_back(view(steps[i], "steps"));
    const Tensor& t = views.back();
    if (t.numel() != 1 || (t.dtype != DType::f32 && t.dtype != DType::i64))
      throw NotTaken(NotTaken::value, message("steps[", i, "]: expected one float32 or int64, got ",
                                              t.numel(), " of ", dtype_name(t.dtype)));
    check_output(t, "steps");
  }
  for (Py_ssize_t i = 0; i < steps.size(); ++i) {
    if (views[i].dtype == DType::f32)
      *views[i].ptr<float>() += 1.0f;
    else
      *views[i].ptr<int64_t>() += 1;
    count_write(steps[i]);
  }
  return py::none();
}

PyMethodDef methods[] = {
    method<counted, count_steps>("count_steps",
                                 "count_steps(steps)\n\nAdds 1 to each of some tensors of one number, "
                                 "float32 or int64."),
    {}};

}  // namespace

void bind_gradient(py::module_& m) {
  add_methods(m, methods);
  m.def("update_tables", &update_tables, py::arg("weights"), py::arg("first"), py::arg("second"),
        py::arg("indices"), py::arg("offsets"), py::arg("per_sample_weights"), py::arg("mode"),
        py::arg("padding_idx"), py::arg("grad"), py::arg("columns"), py::arg("rule"), py::arg("lr"),
        py::arg("eps"), py::arg("beta1"), py::arg("beta2"), py::arg("keep"), py::arg("noise"),
        py::arg("threads"),
        "Applies an optimizer to the rows that the bags use, given the gradient of their pooled output.");
  m.def("sparse_gradient", &sparse_gradient, py::arg("indices"), py::arg("offsets"),
        py::arg("per_sample_weights"), py::arg("mode"), py::arg("padding_idx"), py::arg("num_rows"),
        py::arg("grad"), py::arg("rows"), py::arg("values"), py::arg("threads"),
        "Writes one table's coalesced gradient and returns its number of rows.");
}

}  // namespace mprec::python
