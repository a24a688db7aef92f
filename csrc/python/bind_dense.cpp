#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>

#include "common/error.h"
#include "dense/batch.h"
#include "dense/mlp.h"
#include "python/arguments.h"
#include "python/layers.h"
#include "python/tables.h"
#include "python/tensor.h"
#include "python/weight_watch.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

Tensor output(py::handle object, int64_t rows, int64_t columns) {
  const Tensor out = float_matrix(object.ptr(), "out", rows, columns);
  check_output(out, "out");
  return out;
}

void mlp(const Mlp& mlp, py::handle input, py::handle out_object, int threads) {
  const Tensor in = float_matrix(input.ptr(), "input");
  if (in.shape[1] != mlp.inputs())
    throw py::value_error(message("input: expected ", mlp.inputs(), " columns, got ", in.shape[1]));
  const Tensor out = output(out_object, in.shape[0], mlp.outputs());
  checked_threads(threads);
  py::gil_scoped_release release;
  mlp_forward(mlp.view(), {in.ptr<float>(), in.strides[0]}, in.shape[0], {out.ptr<float>(), out.strides[0]},
              threads);
}

constexpr Signature<6> kept{"mlp_kept", {"mlp", "watch", "input", "weights", "biases", "threads"}};

py::object mlp_kept(const Arguments<6>& a) {
  const auto& packed = instance<const Mlp>(a[0], "mlp", "Mlp");
  const auto& watch = instance<const StackWatch>(a[1], "watch", "StackWatch");
  const List weights(a[3], "weights");
  const Tensor in = float_matrix(a[2], "input");
  const int threads = checked_threads(a[5]);
  if (!watch.matches(weights[0], a[3], a[4], Share::before(in.shape[0]))) return py::bool_(false);
  if (in.shape[1] != packed.inputs())
    throw NotTaken(NotTaken::value,
                   message("input: expected ", packed.inputs(), " columns, got ", in.shape[1]));
  const py::object result = new_tensor({in.shape[0], packed.outputs()}, DType::f32);
  const Tensor out = view(result.ptr(), "out", DType::f32, 2);
  without_gil(true, [&] {
    mlp_forward(packed.view(), {in.ptr<float>(), in.strides[0]}, in.shape[0],
                {out.ptr<float>(), out.strides[0]}, threads);
  });
  return result;
}

PyMethodDef methods[] = {
    method<kept, mlp_kept, false>(
        "try_mlp_kept",
        "try_mlp_kept(mlp, watch, input, weights, biases, threads)\n\nThe MLP of input [B, inputs], a new "
        "tensor; False, with nothing done, if these are not the weights and biases that are watched, "
        "unchanged; None for an input in a form that this does not take."),
    {}};

// The vectors of an interaction: [B, V, D], and perhaps a first one [B, D].
struct Interacting {
  Tensor others;
  std::optional<Tensor> first;
  InteractionView shape;
  int64_t columns;  // of the result

  Interacting(py::handle vectors, py::handle first_vector, bool self)
      : others(view(vectors.ptr(), "vectors", DType::f32, 3)) {
    const auto [samples, count, dim] = std::tuple(others.shape[0], others.shape[1], others.shape[2]);
    if (count > 4096 || dim > 1 << 20)
      throw py::value_error(message("vectors: expected at most 4096 of at most ", 1 << 20, " numbers, got ",
                                    count, " of ", dim));
    if (!first_vector.is_none()) {
      first = view(first_vector.ptr(), "first", DType::f32, 2);
      check_shape(*first, "first", {samples, dim});
    }
    shape = {static_cast<int>(count) + (first ? 1 : 0), static_cast<int>(dim), self};
    columns = shape.products() + (first ? dim : 0);
  }

  Vectors read() const { return {first ? first->ptr<float>() : nullptr, others.ptr<float>()}; }
};

void dot_interaction(py::handle vectors, bool self, py::handle first, py::handle out_object, int threads) {
  const Interacting in(vectors, first, self);
  const Tensor out = output(out_object, in.others.shape[0], in.columns);
  checked_threads(threads);
  py::gil_scoped_release release;
  interaction_forward(in.shape, in.read(), in.others.shape[0], {out.ptr<float>(), out.strides[0]}, threads);
}

void dot_interaction_backward(py::handle grad, py::handle vectors, bool self, py::handle first,
                              py::handle out, py::handle out_first, int threads) {
  const Interacting in(vectors, first, self);
  const Tensor g = view(grad.ptr(), "grad", DType::f32, 2);
  check_shape(g, "grad", {in.others.shape[0], in.columns});
  const Interacting result(out, out_first, self);
  check_shape(result.others, "out", {in.others.shape[0], in.others.shape[1], in.others.shape[2]});
  check_output(result.others, "out");
  if (result.first.has_value() != in.first.has_value())
    throw py::value_error("out_first: expected one if there is a first vector, and else none");
  if (result.first) check_output(*result.first, "out_first");
  checked_threads(threads);
  py::gil_scoped_release release;
  interaction_backward(in.shape, in.read(), g.ptr<float>(), in.others.shape[0],
                       {result.first ? result.first->ptr<float>() : nullptr, result.others.ptr<float>()},
                       threads);
}

}  // namespace

void bind_dense(py::module_& m) {
  py::class_<Mlp>(m, "Mlp", "An MLP's weights, packed for the kernels.")
      .def(py::init([](const std::vector<py::object>& weights, const std::vector<py::object>& biases,
                       const std::vector<int>& activations) {
             return std::make_unique<Mlp>(linear_layers(weights, biases), parse_activations(activations));
           }),
           py::arg("weights"), py::arg("biases"), py::arg("activations"))
      .def_property_readonly("inputs", &Mlp::inputs)
      .def_property_readonly("outputs", &Mlp::outputs)
      .def_property_readonly("nbytes", &Mlp::nbytes);
  add_methods(m, methods);
  m.def("mlp", &mlp, py::arg("mlp"), py::arg("input"), py::arg("out"), py::arg("threads"),
        "The MLP of input [B, inputs] into out [B, outputs], float32.");
  m.def(
      "dot_interaction", &dot_interaction, py::arg("vectors"), py::arg("self_interaction"), py::arg("first"),
      py::arg("out"), py::arg("threads"),
      "Products of all pairs of vectors [B, V, D] into out [B, pairs], float32; or of first [B, D] and them, "
      "first in front of the products.");
  m.def("dot_interaction_backward", &dot_interaction_backward, py::arg("grad"), py::arg("vectors"),
        py::arg("self_interaction"), py::arg("first"), py::arg("out"), py::arg("out_first"),
        py::arg("threads"), "The gradients of vectors and first from that of dot_interaction's result.");
}

}  // namespace mprec::python
