#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bags/check.h"
#include "bags/select.h"
#include "dhe/bag.h"
#include "dhe/decoder.h"
#include "dhe/dhe.h"
#include "dhe/gradient.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/dhe_bags.h"
#include "python/layers.h"
#include "python/tensor.h"
#include "python/weight_watch.h"
#include "registry.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

HashFamily hash_family(int family) {
  if (family < 0 || family > 4) throw py::value_error(message("family: expected 0 to 4, got ", family));
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
  if (!py::isinstance<Decoder>(object))
    throw py::type_error(message(name, ": expected a Decoder, got ", Py_TYPE(object)->tp_name));
  return *py::handle(object).cast<const Decoder*>();
}

// Fills in what both functions below have in common, and runs.
void run_pooled(DheBagRequest r, PyObject* out, bool given, PyObject* threads, PyObject* dedupe) {
  r.dedupe = dedupe == Py_None ? Dedupe::automatic : dedupe == Py_True ? Dedupe::always : Dedupe::never;
  const int64_t width = set_output(r, out, given);
  if (r.num_features == 1) {
    columns_within(r.columns[0], r.decoders[0].dim, width, "out");
  } else {
    std::vector<Columns> blocks;
    for (int64_t t = 0; t < r.num_features; ++t)
      blocks.push_back(columns_within(r.columns[t], r.decoders[t].dim, width, "out"));
    check_apart(std::move(blocks), "out_columns");
  }
  const int thread_count = checked_threads(integer(threads, "threads"));
  {
    py::gil_scoped_release release;
    dhe_bag_forward(r, thread_count);
  }
  if (given) count_write(out);
}

void run(DheBagRequest r, PyObject* per_sample_weights, PyObject* mode, PyObject* out, bool given,
         PyObject* threads, PyObject* dedupe) {
  set_pooling(r, mode, per_sample_weights);
  run_pooled(r, out, given, threads, dedupe);
}

// The bags of the features that a list names, in place of the whole batch; returns the list.
std::vector<int64_t> select_bags(DheBagRequest& r, PyObject* features, Py_ssize_t decoders) {
  const auto chosen = py::cast<std::vector<int64_t>>(py::handle(features));
  if (static_cast<Py_ssize_t>(chosen.size()) != decoders)
    throw py::value_error(
        message("features: expected one for each of the ", decoders, " decoders, got ", chosen.size()));
  for (const int64_t f : chosen)
    if (f < 0 || f >= r.num_features)
      throw py::value_error(message("features: expected 0 to ", r.num_features - 1, ", got ", f));
  check_offsets(r);
  static thread_local SelectedBags selected;
  select_features(r.indices, r.offsets, r.per_sample_weights, chosen, r.bags, selected);
  r.indices = selected.indices;
  r.offsets = selected.offsets;
  if (r.per_sample_weights) r.per_sample_weights = selected.weights.data();
  r.num_features = decoders;
  return chosen;
}

// Bags of one feature.
struct OneFeature {
  DecoderView view;
  int64_t column = 0;
  DheBagRequest request;

  OneFeature(const Decoder& decoder, PyObject* indices, PyObject* offsets, PyObject* include_last_offset,
             PyObject* padding_idx)
      : view(decoder.view()), request(dhe_bags(1, indices, offsets, flag(include_last_offset), padding_idx)) {
    request.decoders = &view;
    request.columns = &column;
  }
  OneFeature(const OneFeature&) = delete;  // `request` points into it
};

template <bool strict>
PyObject* dhe_bag(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object<strict>([&]() -> py::object {
    static constexpr const char* names[] = {
        "decoder", "indices", "offsets", "per_sample_weights", "mode", "include_last_offset", "padding_idx",
        "out",     "threads", "dedupe"};
    const Arguments<10, 9> a("dhe_bag", names, args, count, keywords);
    const OneFeature f(decoder_of(a[0], "decoder"), a[1], a[2], a[5], a[6]);
    const py::object out =
        a[7] == Py_None ? empty_matrix(f.request.bags, f.view.dim) : py::reinterpret_borrow<py::object>(a[7]);
    run(f.request, a[3], a[4], out.ptr(), a[7] != Py_None, a[8], a[9]);
    return out;
  });
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

PyObject* dhe_bag_kept(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object<false>([&]() -> py::object {
    static constexpr const char* names[] = {
        "kept",  "indices", "offsets", "per_sample_weights", "mode", "include_last_offset", "padding_idx",
        "bound", "threads", "dedupe"};
    const Arguments<10> a("dhe_bag_kept", names, args, count, keywords);
    if (!py::isinstance<KeptDecoder>(a[0]))
      throw py::type_error(message("kept: expected a KeptDecoder, got ", Py_TYPE(a[0])->tp_name));
    const auto& kept = *py::handle(a[0]).cast<const KeptDecoder*>();
    OneFeature f(*kept.decoder, a[1], a[2], a[5], a[6]);
    if (kept.watch->changed(Share::before(f.request.indices.size))) return py::bool_(false);
    set_bound(f.request, a[7]);
    py::object out = empty_matrix(f.request.bags, f.view.dim);
    run(f.request, a[3], a[4], out.ptr(), false, a[8], a[9]);
    return out;
  });
}

PyObject* same_stack(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object([&] {
    static constexpr const char* names[] = {"watch", "coefficients", "weights", "biases", "thorough"};
    const Arguments<5> a("same_stack", names, args, count, keywords);
    const Share share = flag(a[4]) ? Share::all() : Share::before(0);
    return py::bool_(py::handle(a[0]).cast<const StackWatch&>().matches(a[1], a[2], a[3], share));
  });
}

template <bool strict>
PyObject* dhe_bag_multi(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded_object<strict>([&]() -> py::object {
    static constexpr const char* names[] = {"decoders", "indices",     "offsets",  "per_sample_weights",
                                            "mode",     "padding_idx", "out",      "out_columns",
                                            "threads",  "dedupe",      "features", "num_features"};
    const Arguments<12, 9> a("dhe_bag_multi", names, args, count, keywords);
    // Owned: the decoders must outlive the call even if another thread empties the list.
    const auto decoders = py::reinterpret_steal<py::object>(PySequence_Tuple(a[0]));
    if (!decoders) throw py::error_already_set();
    const Py_ssize_t features = PyTuple_GET_SIZE(decoders.ptr());
    if (features == 0) throw py::value_error("decoders: expected at least one");
    py::object given;
    if (a[7] != Py_None) {
      given = py::reinterpret_steal<py::object>(PySequence_Tuple(a[7]));
      if (!given) throw py::error_already_set();
      if (PyTuple_GET_SIZE(given.ptr()) != features)
        throw py::value_error(
            message("out_columns: expected ", features, ", got ", PyTuple_GET_SIZE(given.ptr())));
    }
    std::vector<DecoderView> views;
    std::vector<int64_t> columns;
    int64_t column = 0;
    for (Py_ssize_t t = 0; t < features; ++t) {
      views.push_back(decoder_of(PyTuple_GET_ITEM(decoders.ptr(), t), "decoders").view());
      columns.push_back(given ? integer(PyTuple_GET_ITEM(given.ptr(), t), "out_columns") : column);
      column += views.back().dim;
    }
    const bool selects = a[10] != Py_None;
    DheBagRequest r = dhe_bags(selects ? integer(a[11], "num_features") : features, a[1], a[2], true, a[5]);
    set_pooling(r, a[4], a[3]);
    const DheBagRequest whole = r;
    std::vector<int64_t> chosen;
    if (selects) chosen = select_bags(r, a[10], features);
    r.decoders = views.data();
    r.columns = columns.data();
    const py::object out =
        a[6] == Py_None ? empty_matrix(r.bags, column) : py::reinterpret_borrow<py::object>(a[6]);
    try {
      run_pooled(r, out.ptr(), a[6] != Py_None, a[8], a[9]);
    } catch (const IdError&) {  // says where in the whole batch
      if (chosen.empty()) throw;
      std::vector<std::pair<int64_t, int64_t>> bounds;
      for (const int64_t f : chosen) bounds.emplace_back(f, -1);
      check_ids(whole.indices, whole.offsets, BagLayout{whole.num_features, whole.bags}, bounds);
      throw;
    }
    return out;
  });
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

constexpr int flags = METH_FASTCALL | METH_KEYWORDS;
PyMethodDef methods[] = {
    {"dhe_bag", fastcall<&dhe_bag<true>>(), flags, single_doc},
    {"try_dhe_bag", fastcall<&dhe_bag<false>>(), flags, single_doc},
    {"dhe_bag_multi", fastcall<&dhe_bag_multi<true>>(), flags, multi_doc},
    {"try_dhe_bag_multi", fastcall<&dhe_bag_multi<false>>(), flags, multi_doc},
    {"dhe_bag_kept", fastcall<&dhe_bag_kept>(), flags,
     "dhe_bag_kept(kept, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, "
     "bound, threads, dedupe)\n\nThe pooled vectors, a new tensor [B, dim]; False, with nothing done, if "
     "weights have changed; None for tensors in a form that this does not take. bound: refuse IDs not below "
     "this (None: any)."},
    {"same_stack", fastcall<&same_stack>(), flags,
     "same_stack(watch, coefficients, weights, biases, thorough)\n\nWhether these are the watched tensors, "
     "unchanged. thorough: all of their bytes are compared, else a share of them."},
    {nullptr, nullptr, 0, nullptr}};

void backward(const Decoder& decoder, const std::vector<py::object>& weights, py::handle indices,
              py::handle grad, const std::vector<py::object>& grad_weights,
              const std::vector<py::object>& grad_biases, int threads) {
  const std::vector<LinearWeights> layers = matrices(weights);
  if (layers.empty()) throw py::value_error("weights: expected at least one layer");
  checked_threads(threads);
  const Tensor ids = view(indices.ptr(), "indices", DType::i64, 1);
  const Tensor g = view(grad.ptr(), "grad", DType::f32, 2);
  if (g.shape[0] != ids.shape[0] || g.shape[1] != layers.back().outputs)
    throw py::value_error(message("grad: expected shape [", ids.shape[0], ", ", layers.back().outputs,
                                  "], got [", g.shape[0], ", ", g.shape[1], "]"));
  if (grad_weights.size() != layers.size() || grad_biases.size() != layers.size())
    throw py::value_error(message("grad_weights, grad_biases: expected ", layers.size(), " of each, got ",
                                  grad_weights.size(), " and ", grad_biases.size()));
  std::vector<LayerGradient> to;
  for (size_t l = 0; l < layers.size(); ++l) {
    const std::string weight_name = message("grad_weights[", l, "]"),
                      bias_name = message("grad_biases[", l, "]");
    const Tensor w = view(grad_weights[l].ptr(), weight_name.c_str(), DType::f32, 2);
    const Tensor b = view(grad_biases[l].ptr(), bias_name.c_str(), DType::f32, 1);
    if (w.shape[0] != layers[l].outputs || w.shape[1] != layers[l].inputs || b.shape[0] != layers[l].outputs)
      throw py::value_error(message(weight_name, ", ", bias_name, ": expected the shapes of layer ", l));
    check_output(w, weight_name.c_str());
    check_output(b, bias_name.c_str());
    to.push_back({w.ptr<float>(), b.ptr<float>()});
  }
  py::gil_scoped_release release;
  dhe_backward(decoder.view(), layers, ids.ptr<int64_t>(), ids.shape[0], g.ptr<float>(), to, threads);
}

// IDs for the two encoding functions below: int64, none negative.
std::vector<int64_t> checked_ids(py::handle indices) {
  const Integers array = integers(view_ids(indices.ptr(), "indices"));
  std::vector<int64_t> ids(array.size);
  for (int64_t i = 0; i < array.size; ++i) {
    ids[i] = array[i];
    if (ids[i] < 0) throw id_error("indices", i, "", ids[i], -1);
  }
  return ids;
}

Tensor check_encoded(const Tensor& out, int64_t n, int64_t k) {
  if (out.shape[0] != n || out.shape[1] != k)
    throw py::value_error(
        message("out: expected shape [", n, ", ", k, "], got [", out.shape[0], ", ", out.shape[1], "]"));
  check_output(out, "out");
  return out;
}

void hash_encode(py::handle coefficients, py::handle indices, int family, py::handle out_object) {
  const Encoder e = encoder(coefficients, family);
  const std::vector<int64_t> ids = checked_ids(indices);
  const int64_t n = static_cast<int64_t>(ids.size()), k = e.view().k;
  const Tensor out = check_encoded(view(out_object.ptr(), "out", DType::f32, 2), n, k);
  py::gil_scoped_release release;
  kernels().dhe->encode(e.view(), ids.data(), n, out.ptr<float>(), k);
}

void hash_values(py::handle coefficients, py::handle indices, int family, py::handle out_object) {
  const Encoder e = encoder(coefficients, family);
  const std::vector<int64_t> ids = checked_ids(indices);
  const int64_t n = static_cast<int64_t>(ids.size());
  const Tensor out = check_encoded(view(out_object.ptr(), "out", DType::i64, 2), n, e.view().k);
  py::gil_scoped_release release;
  kernels().dhe->hash(e.view(), ids.data(), n, out.ptr<int64_t>());
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
      .def_property_readonly("nbytes", &Decoder::nbytes);
  py::class_<WeightWatch>(m, "WeightWatch", "Notices when tensors in modules' dicts change.")
      .def_static(
          "of", &WeightWatch::of, py::arg("places"), py::arg("blocks") = INT64_MAX,
          "Watches the tensors at places (dict, key); None if one cannot be watched: it is not there, "
          "not on the CPU, or was made in inference mode and so has no version counter. blocks: so "
          "many blocks of each tensor's bytes are looked at, besides its counter.")
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
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("dhe_backward", &backward, py::arg("decoder"), py::arg("weights"), py::arg("indices"),
        py::arg("grad"), py::arg("grad_weights"), py::arg("grad_biases"), py::arg("threads"),
        "Gradients of the weights and biases, overwritten, from that of the IDs' vectors, grad [n, dim].");
  m.def("hash_encode", &hash_encode, py::arg("coefficients"), py::arg("indices"), py::arg("family"),
        py::arg("out"), "The encodings u of n IDs into out [n, k], float32.");
  m.def("hash_values", &hash_values, py::arg("coefficients"), py::arg("indices"), py::arg("family"),
        py::arg("out"), "The hash values h of n IDs into out [n, k], int64.");
}

}  // namespace mprec::python
