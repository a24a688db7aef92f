#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/error.h"
#include "dhe/decoder.h"
#include "program/program.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/layers.h"
#include "python/make_tensor.h"
#include "python/path_program.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Python's arguments of an MLP: weights, biases, activations.
using MlpArguments = std::tuple<std::vector<py::object>, std::vector<py::object>, std::vector<int>>;

Mlp make_mlp(const MlpArguments& arguments, Precision precision) {
  const auto& [weights, biases, activations] = arguments;
  return Mlp(linear_layers(weights, biases), parse_activations(activations), precision);
}

using TableArguments = std::tuple<py::dict, py::str, int64_t, int64_t, int, int>;
using DecoderArguments = std::tuple<py::object, int64_t, int64_t, int>;

Mode mode_of(int mode) {
  if (mode < 0 || mode > 2) throw py::value_error(message("mode: expected 0, 1 or 2, got ", mode));
  return static_cast<Mode>(mode);
}

std::unique_ptr<PathProgram> make_program(int64_t num_features, int num_dense, int dim,
                                          const std::vector<TableArguments>& tables,
                                          const std::vector<DecoderArguments>& decoders,
                                          const std::optional<MlpArguments>& bottom,
                                          const py::object& constant, const MlpArguments& top,
                                          const std::vector<std::tuple<int, int, float>>& mixing,
                                          const std::string& interaction, const py::object& watch,
                                          const std::string& precision_name) {
  if (precision_name != "float32" && precision_name != "bfloat16" && precision_name != "int8")
    throw py::value_error(message("precision: '", precision_name, "' is none of float32, bfloat16, int8"));
  const Precision precision = precision_name == "float32"    ? Precision::float32
                              : precision_name == "bfloat16" ? Precision::bfloat16
                                                             : Precision::int8;
  Program::Parts parts;
  parts.num_features = num_features;
  parts.num_dense = num_dense;
  parts.dim = dim;
  std::vector<TablePlace> places;
  for (const auto& [dict, key, feature, part, mode, bits] : tables) {
    places.emplace_back(dict, key);
    const Feature f = table(matrix(places.back().tensor(), "tables"), "tables", py::int_(bits).ptr());
    if (dim < 1 || f.dim % dim != 0 || f.dim > 4096 * int64_t{dim})
      throw py::value_error(
          message("tables: expected rows of ", dim, " numbers or a multiple of it, got ", f.dim));
    parts.tables.push_back({f.rows, f.num_rows, f.row_bytes, f.format, feature, part, mode_of(mode),
                            static_cast<int>(f.dim / dim)});
  }
  std::vector<py::object> owned;
  for (const auto& [decoder, feature, part, mode] : decoders) {
    owned.push_back(decoder);
    parts.decoders.push_back({decoder.cast<const Decoder&>().view(), feature, part, mode_of(mode)});
  }
  if (bottom) parts.bottom.emplace(make_mlp(*bottom, precision));
  if (!constant.is_none()) {
    const Tensor t = view(constant.ptr(), "constant", DType::f32, 1);
    parts.constant.assign(t.ptr<float>(), t.ptr<float>() + t.shape[0]);
  }
  parts.top.emplace(make_mlp(top, precision));
  for (const auto& [vector, part, weight] : mixing) parts.mixing.push_back({vector, part, weight});
  if (interaction != "dot" && interaction != "cat")
    throw py::value_error(message("interaction: '", interaction, "' is none of dot, cat"));
  parts.interaction = interaction == "dot" ? Interaction::dot : Interaction::cat;
  watch.cast<const WeightWatch&>();  // TypeError for anything else
  return std::make_unique<PathProgram>(PathProgram{Program(std::move(parts)), std::move(places),
                                                   std::move(owned), watch, num_features, num_dense});
}

PyObject* run_program(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object([&]() -> py::object {
    static constexpr const char* names[] = {"program", "dense", "indices", "offsets", "threads"};
    const Arguments<5> a("run_program", names, args, count, keywords);
    if (!py::isinstance<PathProgram>(a[0]))
      throw py::type_error(message("program: expected a PathProgram, got ", Py_TYPE(a[0])->tp_name));
    const auto& path = *py::handle(a[0]).cast<const PathProgram*>();
    const Integers indices = integers(view_ids(a[2], "indices"));
    const Tensor dense = float_matrix(a[1], "dense");
    if (path.changed(dense.shape[0])) return py::none();
    if (dense.shape[1] != path.num_dense)
      throw py::value_error(message("dense: expected [B, ", path.num_dense, "], got [", dense.shape[0], ", ",
                                    dense.shape[1], "]"));
    const Batch batch{dense.ptr<float>(), dense.strides[0], dense.shape[0], indices,
                      integers(view_ids(a[3], "offsets"))};
    const int threads = checked_threads(integer(a[4], "threads"));
    py::object scores = make_tensor(batch.samples, DType::f32);
    const Tensor out = view(scores.ptr(), "scores", DType::f32, 1);
    {
      py::gil_scoped_release release;
      path.program.run(batch, out.ptr<float>(), threads);
    }
    return scores;
  });
}

PyMethodDef methods[] = {
    {"run_program", fastcall<&run_program>(), METH_FASTCALL | METH_KEYWORDS,
     "run_program(program, dense, indices, offsets, threads)\n\n"
     "The scores of a batch, a new tensor [B]; None, with nothing done, if weights have changed. Holds no "
     "lock of Python's meanwhile."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_program(py::module_& m) {
  py::class_<PathProgram>(m, "PathProgram", "A model's whole path, its weights packed for the kernels.")
      .def(py::init(&make_program), py::arg("num_features"), py::arg("num_dense"), py::arg("dim"),
           py::arg("tables"), py::arg("decoders"), py::arg("bottom"), py::arg("constant"), py::arg("top"),
           py::arg("mixing"), py::arg("interaction"), py::arg("watch"), py::arg("precision"))
      .def_property_readonly("nbytes", [](const PathProgram& p) { return p.program.nbytes(); })
      .def("changed", &PathProgram::changed, py::arg("samples") = 0);
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace mprec::python
