#include "dense/mlp.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/error.h"
#include "dhe/pack.h"

namespace mprec {
namespace {

constexpr int64_t largest_size = int64_t{1} << 20;  // of a layer: sizes and offsets then fit everywhere
constexpr int64_t least_int8_inputs = 32;           // of fewer the product takes less time than rounding them

AlignedBuffer<char> pack_row(const LinearWeights& w) {
  AlignedBuffer<char> row(w.inputs * static_cast<int64_t>(sizeof(float)));
  for (int64_t i = 0; i < w.inputs; ++i)
    std::memcpy(row.data() + i * sizeof(float), w.weight + i * w.input_stride, sizeof(float));
  return row;
}

}  // namespace

Mlp::Mlp(const std::vector<LinearWeights>& layers, const std::vector<Activation>& activations,
         Precision precision) {
  if (precision != Precision::float32 && precision != Precision::bfloat16 && precision != Precision::int8)
    throw std::invalid_argument("precision: dense layers are float32, bfloat16 or int8");
  if (layers.empty()) throw std::invalid_argument("weights: expected at least one layer");
  if (activations.size() != layers.size())
    throw std::invalid_argument(message("activations: expected one for each of the ", layers.size(),
                                        " layers, got ", activations.size()));
  for (size_t l = 0; l < layers.size(); ++l) {
    const LinearWeights& w = layers[l];
    if (l > 0 && w.inputs != layers[l - 1].outputs)
      throw std::invalid_argument(
          message("weights[", l, "]: expected ", layers[l - 1].outputs, " inputs, got ", w.inputs));
    for (const auto& [size, what] : {std::pair{w.inputs, " inputs"}, std::pair{w.outputs, " outputs"}})
      if (size < 1 || size > largest_size)
        throw std::invalid_argument(
            message("weights[", l, "]: expected 1 to ", largest_size, what, ", got ", size));
    const int64_t columns = round_up(w.outputs, lut_columns);
    const Precision own =
        precision == Precision::int8 && w.inputs < least_int8_inputs ? Precision::float32 : precision;
    const bool quantised = own == Precision::int8 && w.outputs > 1;
    AlignedBuffer<float> bias(columns), scale(quantised ? 2 * columns : 0);
    for (int64_t o = 0; w.bias && o < w.outputs; ++o) bias.data()[o] = w.bias[o * w.bias_stride];
    float* const shift = quantised ? scale.data() + columns : nullptr;
    weights_.push_back(w.outputs == 1               ? pack_row(w)
                       : quantised                  ? pack_int8(w, scale.data(), shift)
                       : own == Precision::bfloat16 ? pack_bfloat16(w)
                                                    : pack_float32(w));
    for (int64_t o = 0; quantised && o < w.outputs; ++o) shift[o] *= scale.data()[o];
    biases_.push_back(std::move(bias));
    scales_.push_back(std::move(scale));
    layers_.push_back({{weights_[l].data(), scales_[l].data(), biases_[l].data(), static_cast<int>(w.inputs),
                        static_cast<int>(w.outputs), activations[l], shift},
                       own});
    widest_ = std::max({widest_, static_cast<int>(w.inputs), static_cast<int>(w.outputs)});
  }
}

int64_t Mlp::nbytes() const {
  int64_t bytes = 0;
  for (const auto& w : weights_) bytes += w.size();
  for (const auto* kept : {&biases_, &scales_})
    for (const auto& b : *kept) bytes += b.size() * static_cast<int64_t>(sizeof(float));
  return bytes;
}

}  // namespace mprec
