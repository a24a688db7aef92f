#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bags/check.h"
#include "bags/served.h"
#include "dhe/bag.h"
#include "dhe/decoder.h"
#include "dhe/dhe.h"
#include "dhe/gradient.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/layers.h"
#include "python/output.h"
#include "python/tensor.h"
#include "python/weight_watch.h"
#include "registry.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

HashFamily hash_family(int family) {
  if (family < 0 || family >= num_hash_families)
    throw py::value_error(message("family: expected 0 to ", num_hash_families - 1, ", got ", family));
  return static_cast<HashFamily>(family);
}

Activation activation(int value, const char* name) {
  if (value < 0 || value > 3) throw py::value_error(message(name, ": expected 0 to 3, got ", value));
  return static_cast<Activation>(value);
}

Precision parse_precision(const std::string& name) {
  static const char* const names[] = {"float32", "float16", "int8", "lut", "bfloat16"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Precision>(i);
  throw py::value_error(message("precision: '", name, "' is none of float32, float16, int8, lut, bfloat16"));
}

Encoder encoder(py::handle coefficients, int family) {
  const Tensor c = strided(coefficients.ptr(), "coefficients", DType::i32, 2);
  return Encoder({c.ptr<int32_t>(), c.shape[0], c.shape[1], c.strides[0], c.strides[1]}, hash_family(family));
}

std::unique_ptr<Decoder> make_decoder(py::handle coefficients, const std::vector<py::object>& weights,
                                      const std::vector<py::object>& biases, int family, int between,
                                      int last, const std::string& precision) {
  return std::make_unique<Decoder>(encoder(coefficients, family), linear_layers(weights, biases),
                                   activation(between, "activation"), activation(last, "last_activation"),
                                   parse_precision(precision));
}

const Decoder& decoder_of(PyObject* object, const char* name) {
  return instance<const Decoder>(object, name, "Decoder");
}

Dedupe parse_dedupe(PyObject* object) {
  return object == Py_None ? Dedupe::automatic : object == Py_True ? Dedupe::always : Dedupe::never;
}

// One feature's bags.
Bags bags_of_one(PyObject* indices, PyObject* offsets, PyObject* include_last_offset) {
  Bags bags = read_bags(indices, offsets);
  set_features(bags, 1, flag(include_last_offset));
  return bags;
}

py::object pool(const Decoder& decoder, const Bags& bags, PyObject* passed, int64_t largest_id,
                PyObject* threads, PyObject* dedupe) {
  const DheFeature feature{decoder.view(), 0};
  const Output out(passed, bags.batch, feature.decoder.dim, DType::f32);
  const DheRequest request{bags, out.float32(), out.stride(), largest_id};
  out.check_apart_from(bags);
  columns_within(0, feature.decoder.dim, out.width(), "out");
  const int thread_count = checked_threads(threads);
  without_gil(true, [&] { dhe_bag_forward(request, &feature, parse_dedupe(dedupe), thread_count); });
  return out.written();
}

constexpr Signature<10> single{"dhe_bag",
                               {"decoder", "indices", "offsets", "per_sample_weights", "mode",
                                "include_last_offset", "padding_idx", "out", "threads", "dedupe"},
                               9};

py::object dhe_bag(const Arguments<10>& a) {
  const Decoder& decoder = decoder_of(a[0], "decoder");
  Bags bags = bags_of_one(a[1], a[2], a[5]);
  set_pooling(bags, a[4], a[3], a[6]);
  return pool(decoder, bags, a[7], INT64_MAX, a[8], a[9]);
}

// A module's packed decoder, and the places where its weights are.
struct KeptDecoder {
  const WeightWatch* watch;
  const Decoder* decoder;
  py::object owned_watch, owned_decoder;

  KeptDecoder(const py::object& w, const py::object& d)
      : watch(&w.cast<const WeightWatch&>()),
        decoder(&d.cast<const Decoder&>()),
        owned_watch(w),
        owned_decoder(d) {}
};

constexpr Signature<10> kept_one{"dhe_bag_kept",
                                 {"kept", "indices", "offsets", "per_sample_weights", "mode",
                                  "include_last_offset", "padding_idx", "bound", "threads", "dedupe"}};

py::object dhe_bag_kept(const Arguments<10>& a) {
  const auto& kept = instance<const KeptDecoder>(a[0], "kept", "KeptDecoder");
  Bags bags = bags_of_one(a[1], a[2], a[5]);
  if (kept.watch->changed(Share::before(bags.indices.size))) return py::bool_(false);
  set_pooling(bags, a[4], a[3], a[6]);
  return pool(*kept.decoder, bags, Py_None, largest_id(a[7]), a[8], a[9]);
}

constexpr Signature<5> watched{"same_stack", {"watch", "coefficients", "weights", "biases", "thorough"}};

py::object same_stack(const Arguments<5>& a) {
  const Share share = flag(a[4]) ? Share::all() : Share::before(0);
  return py::bool_(py::handle(a[0]).cast<const StackWatch&>().matches(a[1], a[2], a[3], share));
}

constexpr Signature<12> multi{"dhe_bag_multi",
                              {"decoders", "indices", "offsets", "per_sample_weights", "mode", "padding_idx",
                               "out", "out_columns", "threads", "dedupe", "features", "num_features"},
                              9};

py::object dhe_bag_multi(const Arguments<12>& a) {
  const List decoders(a[0], "decoders");
  const Py_ssize_t count = decoders.size();
  const List columns(a[7], "out_columns", count), named(a[10], "features", count);
  Bags whole = read_bags(a[1], a[2]);
  set_features(whole, named ? integer(a[11], "num_features") : count);
  set_pooling(whole, a[4], a[3], count == 1 ? a[5] : Py_None);
  const ServedBags bags(whole, features_of(named, whole.num_features));

  std::vector<DheFeature> features;
  int64_t width = 0;
  for (Py_ssize_t t = 0; t < count; ++t) {
    const DecoderView decoder = decoder_of(decoders[t], "decoders").view();
    features.push_back({decoder, columns ? integer(columns[t], "out_columns") : width});
    width += decoder.dim;
  }
  const Output out(a[6], bags->batch, width, DType::f32);
  const DheRequest request{*bags, out.float32(), out.stride()};
  out.check_apart_from(whole);
  std::vector<Columns> blocks;
  for (const DheFeature& f : features)
    blocks.push_back(columns_within(f.column, f.decoder.dim, out.width(), "out"));
  check_apart(std::move(blocks), "out_columns");
  const int threads = checked_threads(a[8]);
  bags.run(
      [&] {
        without_gil(true, [&] { dhe_bag_forward(request, features.data(), parse_dedupe(a[9]), threads); });
      },
      [](size_t) { return -1; });
  return out.written();
}

constexpr const char single_doc[] =
    "dhe_bag(decoder, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, out, "
    "threads, dedupe=None)\n\nPools one feature's decoded IDs into out [B, dim] (None: a new tensor), which "
    "is returned. dedupe: compute equal IDs once (None: choose). try_...: None for tensors in a form that "
    "this does not take.";
constexpr const char multi_doc[] =
    "dhe_bag_multi(decoders, indices, offsets, per_sample_weights, mode, padding_idx, out, out_columns, "
    "threads, dedupe=None, features=None, num_features=None)\n\nPools every feature's decoded IDs into its "
    "columns of out [B, total] (None: a new tensor), which is returned. features: which of the batch's "
    "num_features features each decoder serves (None: all, in order). try_...: None for tensors in a form "
    "that this does not take.";

PyMethodDef methods[] = {
    method<single, dhe_bag>("dhe_bag", single_doc),
    method<single, dhe_bag, false>("try_dhe_bag", single_doc),
    method<multi, dhe_bag_multi>("dhe_bag_multi", multi_doc),
    method<multi, dhe_bag_multi, false>("try_dhe_bag_multi", multi_doc),
    method<kept_one, dhe_bag_kept, false>(
        "dhe_bag_kept",
        "dhe_bag_kept(kept, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, "
        "bound, threads, dedupe)\n\nThe pooled vectors, a new tensor [B, dim]; False, with nothing done, if "
        "weights have changed; None for tensors in a form that this does not take. bound: refuse IDs not "
        "below this (None: any)."),
    method<watched, same_stack>(
        "same_stack",
        "same_stack(watch, coefficients, weights, biases, thorough)\n\nWhether these are the watched "
        "tensors, unchanged. thorough: all of their bytes are compared, else a share of them."),
    {}};

// A forward pass of training: the pooled vectors, and the number of distinct IDs, whose activations are kept.
py::tuple dhe_bag_keeping(const Decoder& decoder, py::handle indices, py::handle offsets,
                          py::handle per_sample_weights, py::handle mode, py::handle include_last_offset,
                          py::handle padding_idx, py::handle kept, py::handle distinct,
                          py::handle row_of_entry, int threads) {
  if (decoder.view().precision != Precision::float32)
    throw py::value_error("decoder: expected one of precision float32");
  Bags bags = bags_of_one(indices.ptr(), offsets.ptr(), include_last_offset.ptr());
  set_pooling(bags, mode.ptr(), per_sample_weights.ptr(), padding_idx.ptr());
  const DheFeature feature{decoder.view(), 0};
  const int64_t n = bags.indices.size;
  const Tensor floats = view(kept.ptr(), "kept", DType::f32, 3);
  const Tensor ids = view(distinct.ptr(), "distinct", DType::i64, 1);
  const Tensor rows = view(row_of_entry.ptr(), "row_of_entry", DType::i32, 1);
  check_shape(floats, "kept", {kept_blocks(feature.decoder), n, block_pitch});
  check_shape(ids, "distinct", {n});
  check_shape(rows, "row_of_entry", {n});
  check_output(floats, "kept");
  check_output(ids, "distinct");
  check_output(rows, "row_of_entry");
  const Output out(Py_None, bags.batch, feature.decoder.dim, DType::f32);
  const DheRequest request{bags, out.float32(), out.stride()};
  KeptActivations keeping{floats.ptr<float>(), ids.ptr<int64_t>(), rows.ptr<int32_t>()};
  checked_threads(threads);
  without_gil(true, [&] { dhe_bag_forward(request, &feature, Dedupe::always, threads, &keeping); });
  return py::make_tuple(out.written(), keeping.count);
}

void backward(const Decoder& decoder, const std::vector<py::object>& weights, py::handle indices,
              py::handle grad, const std::vector<py::object>& grad_weights,
              const std::vector<py::object>& grad_biases, int threads, py::handle kept) {
  const std::vector<LinearWeights> layers = matrices(weights);
  if (layers.empty()) throw py::value_error("weights: expected at least one layer");
  checked_threads(threads);
  const Tensor ids = view(indices.ptr(), "indices", DType::i64, 1);
  const Tensor g = view(grad.ptr(), "grad", DType::f32, 2);
  check_shape(g, "grad", {ids.shape[0], layers.back().outputs});
  if (grad_weights.size() != layers.size() || grad_biases.size() != layers.size())
    throw py::value_error(message("grad_weights, grad_biases: expected ", layers.size(), " of each, got ",
                                  grad_weights.size(), " and ", grad_biases.size()));
  std::vector<LayerGradient> to;
  for (size_t l = 0; l < layers.size(); ++l) {
    const std::string weight_name = message("grad_weights[", l, "]"),
                      bias_name = message("grad_biases[", l, "]");
    const Tensor w = view(grad_weights[l].ptr(), weight_name.c_str(), DType::f32, 2);
    const Tensor b = view(grad_biases[l].ptr(), bias_name.c_str(), DType::f32, 1);
    check_shape(w, weight_name.c_str(), {layers[l].outputs, layers[l].inputs});
    check_shape(b, bias_name.c_str(), {layers[l].outputs});
    check_output(w, weight_name.c_str());
    check_output(b, bias_name.c_str());
    to.push_back({w.ptr<float>(), b.ptr<float>()});
  }
  const float* activations = nullptr;
  int64_t stride = 0;
  if (!kept.is_none()) {
    const Tensor k = view(kept.ptr(), "kept", DType::f32, 3);
    check_shape(k, "kept", {kept_blocks(decoder.view()), std::max(k.shape[1], ids.shape[0]), block_pitch});
    activations = k.ptr<float>();
    stride = k.shape[1] * block_pitch;
  }
  py::gil_scoped_release release;
  dhe_backward(decoder.view(), layers, ids.ptr<int64_t>(), ids.shape[0], activations, stride, g.ptr<float>(),
               to, threads);
}

// Runs `kernel(encoder, ids, n, out)` on IDs, none negative, and an output [n, k].
template <class Out, class Kernel>
void encode(py::handle coefficients, py::handle indices, int family, py::handle out_object, DType dtype,
            const Kernel& kernel) {
  const Encoder e = encoder(coefficients, family);
  const Integers given = integers(indices.ptr(), "indices");
  check_ids(given, -1, "indices");
  const int64_t n = given.size;
  std::vector<int64_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = given[i];
  const Tensor out = view(out_object.ptr(), "out", dtype, 2);
  check_shape(out, "out", {n, e.view().k});
  check_output(out, "out");
  py::gil_scoped_release release;
  kernel(e.view(), ids.data(), n, out.ptr<Out>());
}

void hash_encode(py::handle coefficients, py::handle indices, int family, py::handle out) {
  encode<float>(coefficients, indices, family, out, DType::f32,
                [](const EncoderView& e, const int64_t* ids, int64_t n, float* to) {
                  kernels().dhe->encode(e, ids, n, to, e.k);
                });
}

void hash_values(py::handle coefficients, py::handle indices, int family, py::handle out) {
  encode<int64_t>(coefficients, indices, family, out, DType::i64, kernels().dhe->hash);
}

}  // namespace

void bind_dhe(py::module_& m) {
  py::class_<Decoder>(m, "Decoder", "An encoder's coefficients and an MLP's weights, packed for the kernels.")
      .def(py::init(&make_decoder), py::arg("coefficients"), py::arg("weights"), py::arg("biases"),
           py::arg("family"), py::arg("activation"), py::arg("last_activation"),
           py::arg("precision") = "float32")
      .def_property_readonly("k", [](const Decoder& d) { return d.view().encoder.k; })
      .def_property_readonly("dim", [](const Decoder& d) { return d.view().dim; })
      .def_property_readonly("dims",
                             [](const Decoder& d) {
                               std::vector<int> dims{d.view().encoder.k};
                               for (const LayerView& layer : d.layers()) dims.push_back(layer.outputs);
                               return dims;
                             })
      .def(
          "kept_shape",
          [](const Decoder& d, int64_t n) { return py::make_tuple(kept_blocks(d.view()), n, block_pitch); },
          py::arg("n"), "Of the activations, in float32, that a training step keeps of n IDs.")
      .def_property_readonly("nbytes", &Decoder::nbytes);
  py::class_<WeightWatch>(m, "WeightWatch", "Notices when tensors in modules' dicts change.")
      .def_static(
          "of", &WeightWatch::of, py::arg("places"), py::arg("blocks") = INT64_MAX,
          "Watches the tensors at places (dict, key); None if one cannot be watched: it is not there, "
          "not on the CPU, or was made in inference mode and so has no version counter. A key of None "
          "watches the size of the dict. blocks: so many blocks of each tensor's bytes are looked at, "
          "besides its counter.")
      .def(
          "changed", [](const WeightWatch& w, int64_t ids) { return w.changed(Share::before(ids)); },
          py::arg("ids") = 0, "Before so many IDs are decoded: the more, the more bytes are compared.")
      .def_static("forget_all", &WeightWatch::forget_all,
                  "Every watch reports a change from now on: for writes that raise no version counter.");
  py::class_<StackWatch>(m, "StackWatch", "Knows one decoder's tensors again, unless they have changed.")
      .def_static("of", &StackWatch::of, py::arg("coefficients"), py::arg("weights"), py::arg("biases"),
                  "None if a tensor cannot be watched: it was made in inference mode, or is not on the CPU.");
  py::class_<KeptDecoder>(m, "KeptDecoder", "A packed decoder and the watch of its weights.")
      .def(py::init<const py::object&, const py::object&>(), py::arg("watch"), py::arg("decoder"));
  add_methods(m, methods);
  m.attr("block_columns") = block_columns;  // of activations that dhe_bag_keeping gives
  m.def("dhe_backward", &backward, py::arg("decoder"), py::arg("weights"), py::arg("indices"),
        py::arg("grad"), py::arg("grad_weights"), py::arg("grad_biases"), py::arg("threads"),
        py::arg("kept") = py::none(),
        "Gradients of the weights and biases, overwritten, from that of the IDs' vectors, grad [n, dim]. "
        "kept: the IDs' activations, by dhe_bag_keeping; None: they are made again.");
  m.def("dhe_bag_keeping", &dhe_bag_keeping, py::arg("decoder"), py::arg("indices"), py::arg("offsets"),
        py::arg("per_sample_weights"), py::arg("mode"), py::arg("include_last_offset"),
        py::arg("padding_idx"), py::arg("kept"), py::arg("distinct"), py::arg("row_of_entry"),
        py::arg("threads"),
        "As dhe_bag, for n entries: (out, count). Their distinct IDs go to distinct [n], of which count are "
        "written; which of them each entry has (-1: padding) to row_of_entry [n], int32; and the activations "
        "that a backward pass needs to kept, of the shape decoder.kept_shape(n).");
  m.def("hash_encode", &hash_encode, py::arg("coefficients"), py::arg("indices"), py::arg("family"),
        py::arg("out"), "The encodings u of n IDs into out [n, k], float32.");
  m.def("hash_values", &hash_values, py::arg("coefficients"), py::arg("indices"), py::arg("family"),
        py::arg("out"), "The hash values h of n IDs into out [n, k], int64.");
}

}  // namespace mprec::python
