#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "common/error.h"
#include "dhe/decoder.h"
#include "program/program.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/cached_decoders.h"
#include "python/layers.h"
#include "python/path_program.h"
#include "python/tables.h"
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

// The matrix [r][dim] and the bias [dim], or None, that make vectors of pooled rows.
using ProjectionArguments = std::pair<py::object, py::object>;
// Dict and key of the rows, feature, part, mode, bits; which rows, None: all; projection.
using TableArguments =
    std::tuple<py::dict, py::str, int64_t, int64_t, int, int, std::optional<std::pair<int64_t, int64_t>>,
               std::optional<ProjectionArguments>>;
using DecoderArguments = std::tuple<py::object, int64_t, int64_t, int>;
// CachedDecoders, part of each, mode, whether decoded rows may enter the caches.
using CachedArguments = std::tuple<py::object, std::vector<int64_t>, int, bool>;
// The IDs with rows int64 [n], IDs are below, feature, part, mode; the rows; the rest: a table or a decoder,
// whose feature, part and mode are not read.
using HotArguments = std::tuple<py::object, int64_t, int64_t, int64_t, int, TableArguments,
                                std::variant<TableArguments, DecoderArguments>>;
// Feature, its first part, which IDs are known uint8 [n], the one for the others, whether it pools by the
// mean, the correction [parts * dim].
using UnseenArguments = std::tuple<int64_t, int64_t, py::object, int64_t, bool, py::object>;

std::vector<float> floats(const py::object& tensor, const char* name, int dims) {
  const Tensor t = view(tensor.ptr(), name, DType::f32, dims);
  return {t.ptr<float>(), t.ptr<float>() + t.numel()};
}

Projection projection_of(const ProjectionArguments& arguments, int64_t rank) {
  const auto& [matrix, bias] = arguments;
  return {static_cast<int>(rank), floats(matrix, "projections", 2),
          bias.is_none() ? std::vector<float>() : floats(bias, "projections", 1)};
}

// As table(), also of int8 codes, whose scale their projection has.
PooledTable rows_of(PyObject* tensor, int bits, bool codes) {
  const Tensor t = matrix(tensor, "tables");
  if (!codes || t.dtype != DType::i8) return table(t, "tables", py::int_(bits).ptr());
  PooledTable f{};
  f.rows = t.ptr<char>();
  f.num_rows = t.shape[0];
  f.dim = t.shape[1];
  f.row_bytes = t.strides[0];
  f.format = Format::code;
  return f;
}

TableStage table_stage(const TableArguments& arguments, int dim, std::vector<TablePlace>& places) {
  const auto& [dict, key, feature, part, mode, bits, window, projection] = arguments;
  places.emplace_back(dict, key);
  const PooledTable f = rows_of(places.back().tensor(), bits, projection.has_value());
  const auto [begin, end] = window.value_or(std::pair<int64_t, int64_t>(0, f.num_rows));
  if (begin < 0 || begin > end || end > f.num_rows)
    throw py::value_error(message("tables: rows ", begin, " to ", end, " are none of ", f.num_rows));
  TableStage stage{
      f.rows + begin * f.row_bytes, end - begin, f.row_bytes, f.format, feature, part, pooling_mode(mode)};
  if (projection) {
    if (f.dim < 1 || f.dim > 4096) throw py::value_error(message("projections: rank ", f.dim));
    stage.projection = projection_of(*projection, f.dim);
  } else if (dim < 1 || f.dim % dim != 0 || f.dim > 4096 * int64_t{dim}) {
    throw py::value_error(
        message("tables: expected rows of ", dim, " numbers or a multiple of it, got ", f.dim));
  } else {
    stage.vectors = static_cast<int>(f.dim / dim);
  }
  return stage;
}

DecoderStage decoder_stage(const DecoderArguments& arguments, std::vector<py::object>& owned) {
  const auto& [decoder, feature, part, mode] = arguments;
  owned.push_back(decoder);
  return {decoder.cast<const Decoder&>().view(), feature, part, pooling_mode(mode)};
}

CachedStage cached_stage(const CachedArguments& arguments, int64_t num_features, PathProgram& path) {
  const auto& [object, parts, mode, admit] = arguments;
  auto& decoders = object.cast<CachedDecoders&>();
  if (decoders.num_features() != num_features)
    throw py::value_error(message("cached: expected decoders of a batch of ", num_features, " features, got ",
                                  decoders.num_features()));
  path.owned.push_back(object);
  path.cached.push_back(&decoders);
  return {decoders.features(), parts, pooling_mode(mode), admit, &decoders.counters()};
}

HotStage hot_stage(const HotArguments& arguments, int dim, PathProgram& path) {
  const auto& [ids, num_ids, feature, part, mode, rows, rest] = arguments;
  const Tensor t = view(ids.ptr(), "ids", DType::i64, 1);
  HotStage stage{HotIds({t.ptr<int64_t>(), t.ptr<int64_t>() + t.numel()}, num_ids),
                 feature,
                 part,
                 pooling_mode(mode),
                 table_stage(rows, dim, path.tables),
                 {}};
  if (const auto* table = std::get_if<TableArguments>(&rest))
    stage.rest = table_stage(*table, dim, path.tables);
  else
    stage.rest = decoder_stage(std::get<DecoderArguments>(rest), path.owned);
  return stage;
}

UnseenStage unseen_stage(const UnseenArguments& arguments) {
  const auto& [feature, part, known, proxy, averaged, correction] = arguments;
  const Tensor t = view(known.ptr(), "known", DType::u8, 1);
  std::vector<bool> is_known(t.ptr<uint8_t>(), t.ptr<uint8_t>() + t.numel());
  return {feature, part, std::move(is_known), proxy, averaged, floats(correction, "correction", 1)};
}

std::unique_ptr<PathProgram> make_program(
    int64_t num_features, int num_dense, int dim, const std::vector<TableArguments>& tables,
    const std::vector<DecoderArguments>& decoders, const std::optional<MlpArguments>& bottom,
    const py::object& constant, const MlpArguments& top,
    const std::vector<std::tuple<int, int, float>>& mixing, const std::string& interaction,
    const py::object& watch, const std::string& precision_name, const std::vector<CachedArguments>& cached,
    const std::vector<HotArguments>& hot, const std::vector<UnseenArguments>& unseen) {
  if (precision_name != "float32" && precision_name != "bfloat16" && precision_name != "int8")
    throw py::value_error(message("precision: '", precision_name, "' is none of float32, bfloat16, int8"));
  const Precision precision = precision_name == "float32"    ? Precision::float32
                              : precision_name == "bfloat16" ? Precision::bfloat16
                                                             : Precision::int8;
  watch.cast<const WeightWatch&>();  // TypeError for anything else
  auto path = std::make_unique<PathProgram>();
  path->watch = watch;
  path->num_features = num_features;
  path->num_dense = num_dense;
  Program::Parts parts;
  parts.num_features = num_features;
  parts.num_dense = num_dense;
  parts.dim = dim;
  for (const auto& each : tables) parts.tables.push_back(table_stage(each, dim, path->tables));
  for (const auto& each : decoders) parts.decoders.push_back(decoder_stage(each, path->owned));
  for (const auto& each : cached) parts.cached.push_back(cached_stage(each, num_features, *path));
  for (const auto& each : hot) parts.hot.push_back(hot_stage(each, dim, *path));
  for (const auto& each : unseen) parts.unseen.push_back(unseen_stage(each));
  if (bottom) parts.bottom.emplace(make_mlp(*bottom, precision));
  if (!constant.is_none()) parts.constant = floats(constant, "constant", 1);
  parts.top.emplace(make_mlp(top, precision));
  for (const auto& [vector, part, weight] : mixing) parts.mixing.push_back({vector, part, weight});
  if (interaction != "dot" && interaction != "cat")
    throw py::value_error(message("interaction: '", interaction, "' is none of dot, cat"));
  parts.interaction = interaction == "dot" ? Interaction::dot : Interaction::cat;
  path->program.emplace(std::move(parts));
  return path;
}

constexpr Signature<5> running{"run_program", {"program", "dense", "indices", "offsets", "threads"}};

py::object run_program(const Arguments<5>& a) {
  const auto& path = instance<const PathProgram>(a[0], "program", "PathProgram");
  const Tensor dense = float_matrix(a[1], "dense");
  Bags bags = read_bags(a[2], a[3]);
  const int64_t samples = dense.shape[0];
  if (path.changed(samples)) return py::none();
  if (dense.shape[1] != path.num_dense)
    throw NotTaken(NotTaken::value, message("dense: expected shape [", samples, ", ", path.num_dense,
                                            "], got [", samples, ", ", dense.shape[1], "]"));
  bags.num_features = path.num_features;
  bags.batch = samples;
  const int threads = checked_threads(a[4]);
  const py::object scores = new_tensor({samples}, DType::f32);
  const Tensor out = view(scores.ptr(), "scores", DType::f32, 1);
  without_gil(true, [&] {
    path.program->run({dense.ptr<float>(), dense.strides[0], bags}, out.ptr<float>(), threads);
  });
  return scores;
}

constexpr const char running_doc[] =
    "run_program(program, dense, indices, offsets, threads)\n\nThe scores of a batch, a new tensor [B]; "
    "None, with nothing done, if weights have changed: program.changed() is True from then on. Holds no lock "
    "of Python's meanwhile. try_...: None also for tensors in a form that this does not take.";

PyMethodDef methods[] = {method<running, run_program>("run_program", running_doc),
                         method<running, run_program, false>("try_run_program", running_doc),
                         {}};

}  // namespace

void bind_program(py::module_& m) {
  py::class_<PathProgram>(m, "PathProgram", "A model's whole path, its weights packed for the kernels.")
      .def(py::init(&make_program), py::arg("num_features"), py::arg("num_dense"), py::arg("dim"),
           py::arg("tables"), py::arg("decoders"), py::arg("bottom"), py::arg("constant"), py::arg("top"),
           py::arg("mixing"), py::arg("interaction"), py::arg("watch"), py::arg("precision"),
           py::arg("cached") = std::vector<CachedArguments>(), py::arg("hot") = std::vector<HotArguments>(),
           py::arg("unseen") = std::vector<UnseenArguments>())
      .def_property_readonly("nbytes", [](const PathProgram& p) { return p.program->nbytes(); })
      .def("changed", &PathProgram::changed, py::arg("samples") = 0);
  add_methods(m, methods);
}

}  // namespace mprec::python
