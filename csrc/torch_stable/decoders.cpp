// Bags of deep hash embeddings.
#include <memory>
#include <utility>
#include <vector>

#include "bags/served.h"
#include "dhe/bag.h"
#include "dhe/decoder.h"
#include "torch_stable/bags.h"
#include "torch_stable/kept.h"
#include "torch_stable/layers.h"
#include "torch_stable/operators.h"

namespace mprec::stable {
namespace {

using Packed = std::shared_ptr<const Decoder>;

// What the decoders of a call share.
struct Options {
  HashFamily family;
  Activation activation, last_activation;
};

HashFamily hash_family(const std::string& text) {
  const auto name_of = [](int i) { return traits(static_cast<HashFamily>(i)).name; };
  return static_cast<HashFamily>(code(num_hash_families, name_of, text, {"family"}));
}

Precision precision_of(const std::string& text) {
  static constexpr const char* names[] = {"float32", "float16", "int8", "lut", "bfloat16"};
  for (int i = 0; i < 5; ++i)
    if (text == names[i]) return static_cast<Precision>(i);
  throw refusal("precision: '", text, "' is none of float32, float16, int8, lut, bfloat16");
}

// `t`: for errors, 0 of several decoders and -1 of one.
Options options_of(StringHandle family, StringHandle activation, StringHandle last_activation, int64_t t) {
  const std::string names[] = {taken(family), taken(activation), taken(last_activation)};
  return {hash_family(names[0]), activation_of(names[1], {"activation", -1, t}),
          activation_of(names[2], {"last_activation", -1, t})};
}

// One feature's decoder, packed; `t`: -1, or its place among several, for errors.
Packed packed(const Tensor& coefficients, const Tensor* weights, int64_t count, const Tensor* biases,
              int64_t num_biases, const Options& o, Precision precision, int64_t t) {
  const int64_t rows = traits(o.family).artifact ? 2 : 4;
  const View hashes = contiguous(coefficients, {"coefficients", -1, t});
  if (hashes.dtype != ScalarType::Int)
    throw refusal(Name{"coefficients", -1, t}, ": expected int32, got ", dtype_name(hashes.dtype));
  if (hashes.ndim() != 2 || hashes.shape[0] != rows || hashes.shape[1] == 0)
    throw refusal(Name{"coefficients", -1, t}, ": expected [", rows, ", k] for family '",
                  traits(o.family).name, "', got ", list(hashes.shape));
  if (count == 0 || count != num_biases)
    throw refusal(Name{"weights, biases", -1, t},
                  ": expected one of each per layer, at least one layer, got ", count, " and ", num_biases);
  const Layers layers(weights, biases, count, hashes.shape[1], nullptr, t);
  std::vector<View> sources{hashes};
  sources.insert(sources.end(), layers.views().begin(), layers.views().end());

  static Kept<Decoder> kept;
  const auto number = [](auto value) { return static_cast<int64_t>(value); };
  return kept.get(
      sources, {number(o.family), number(o.activation), number(o.last_activation), number(precision), count},
      [&](const std::vector<std::vector<char>>& copies) {
        const int64_t k = hashes.shape[1];
        const auto* data = reinterpret_cast<const int32_t*>(copies[0].data());
        return Decoder(Encoder({data, rows, k, k, 1}, o.family), layers.linear(&copies[1]), o.activation,
                       o.last_activation, precision);
      });
}

// The vectors of all decoders, side by side.
Tensor pool(const std::vector<Packed>& decoders, const CheckedBags& checked) {
  const ServedBags bags(*checked, checked.features());
  std::vector<DheFeature> features;
  int64_t width = 0;
  for (const Packed& decoder : decoders) {
    features.push_back({decoder->view(), width});
    width += features.back().decoder.dim;
  }
  const Matrix out = new_floats(bags->batch, width);
  const DheRequest request{*bags, reinterpret_cast<float*>(out.data), width};
  bags.run([&] { dhe_bag_forward(request, features.data(), Dedupe::automatic, threads()); },
           [](size_t) { return -1; });
  return out.tensor;
}

// `precisions`: null, or one for each decoder.
Tensor pool_many(const Tensor& indices, const Tensor& offsets, const Tensors& coefficients,
                 const Tensors& weights, const Tensors& biases, const Numbers& layers, const Options& options,
                 const std::vector<Precision>* precisions, int64_t mode,
                 const std::optional<Tensor>& per_sample_weights, const std::optional<Numbers>& features,
                 std::optional<int64_t> num_features) {
  const auto count = static_cast<int64_t>(layers.size());
  int64_t total = 0;
  bool positive = true;
  for (const int64_t n : layers) {
    positive &= n >= 0 && n <= static_cast<int64_t>(weights.size());
    total += positive ? n : 0;
  }
  if (!count || !positive || coefficients.size() != layers.size() ||
      total != static_cast<int64_t>(weights.size()) || weights.size() != biases.size())
    throw refusal("layers: ", list(layers), " do not describe ", coefficients.size(), " coefficients, ",
                  weights.size(), " weights and ", biases.size(), " biases");
  if (precisions && precisions->size() != layers.size())
    throw refusal("precisions: expected one for each of ", count, " decoders, got ", precisions->size());
  std::vector<Packed> decoders;
  int64_t begin = 0;
  for (int64_t t = 0; t < count; begin += layers[t++])
    decoders.push_back(packed(coefficients[t], weights.data() + begin, layers[t], biases.data() + begin,
                              layers[t], options, precisions ? (*precisions)[t] : Precision::float32,
                              count > 1 ? t : -1));
  const CheckedBags bags({indices, offsets, mode, per_sample_weights, features, num_features}, count,
                         ScalarType::Float, true);
  return pool(decoders, bags);
}

}  // namespace

Tensor dhe_bag(const Tensor& indices, const Tensor& offsets, const Tensor& coefficients,
               const Tensors& weights, const Tensors& biases, StringHandle family, StringHandle activation,
               StringHandle last_activation, int64_t mode, const std::optional<Tensor>& per_sample_weights,
               bool include_last_offset, int64_t padding_idx) {
  const Options options = options_of(family, activation, last_activation, -1);
  const Packed decoder =
      packed(coefficients, weights.data(), static_cast<int64_t>(weights.size()), biases.data(),
             static_cast<int64_t>(biases.size()), options, Precision::float32, -1);
  const CheckedBags bags(
      {indices, offsets, mode, per_sample_weights, std::nullopt, 1, include_last_offset, padding_idx}, 1,
      ScalarType::Float, true);
  return pool({decoder}, bags);
}

Tensor dhe_bag_multi(const Tensor& indices, const Tensor& offsets, const Tensors& coefficients,
                     const Tensors& weights, const Tensors& biases, const Numbers& layers,
                     StringHandle family, StringHandle activation, StringHandle last_activation, int64_t mode,
                     const std::optional<Tensor>& per_sample_weights, const std::optional<Numbers>& features,
                     std::optional<int64_t> num_features) {
  const Options options = options_of(family, activation, last_activation, layers.size() > 1 ? 0 : -1);
  return pool_many(indices, offsets, coefficients, weights, biases, layers, options, nullptr, mode,
                   per_sample_weights, features, num_features);
}

Tensor packed_dhe_bag_multi(const Tensor& indices, const Tensor& offsets, const Tensors& coefficients,
                            const Tensors& weights, const Tensors& biases, const Numbers& layers,
                            StringHandle family, StringHandle activation, StringHandle last_activation,
                            const std::vector<StringHandle>& precisions, int64_t mode,
                            const std::optional<Tensor>& per_sample_weights,
                            const std::optional<Numbers>& features, std::optional<int64_t> num_features) {
  std::vector<std::string> names;
  for (const StringHandle handle : precisions) names.push_back(taken(handle));
  const Options options = options_of(family, activation, last_activation, layers.size() > 1 ? 0 : -1);
  std::vector<Precision> parsed;
  for (const std::string& name : names) parsed.push_back(precision_of(name));
  return pool_many(indices, offsets, coefficients, weights, biases, layers, options, &parsed, mode,
                   per_sample_weights, features, num_features);
}

}  // namespace mprec::stable
