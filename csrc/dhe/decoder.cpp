#include "dhe/decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/error.h"

namespace mprec {
namespace {

constexpr int64_t largest_size = int64_t{1} << 20;  // of a layer: sizes and offsets then fit everywhere

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

uint32_t float_bits(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

// Panels of 16 outputs, [outputs / 16][inputs][16], zeros beyond the last output.
AlignedBuffer<float> pack(const LinearWeights& w) {
  AlignedBuffer<float> panels(round_up(w.outputs, panel_columns) * w.inputs);
  for (int64_t o = 0; o < w.outputs; ++o) {
    const float* row = w.weight + o * w.output_stride;
    float* column = panels.data() + o / panel_columns * w.inputs * panel_columns + o % panel_columns;
    for (int64_t i = 0; i < w.inputs; ++i) column[i * panel_columns] = row[i * w.input_stride];
  }
  return panels;
}

}  // namespace

Encoder::Encoder(const CoefficientMatrix& c, HashFamily family) : family_(family) {
  const bool artifact = family == HashFamily::artifact || family == HashFamily::artifact_gaussian;
  const int64_t expected_rows = artifact ? 2 : 4, p = artifact ? artifact_p : mersenne_p;
  if (c.rows != expected_rows)
    throw std::invalid_argument(
        message("coefficients: expected ", expected_rows, " rows for this hash family, got ", c.rows));
  if (c.k < 1 || c.k > largest_size)
    throw std::invalid_argument(message("coefficients: expected 1 to ", largest_size, " columns, got ", c.k));
  if (family == HashFamily::artifact_gaussian && c.k % 2 != 0)
    throw std::invalid_argument(
        message("coefficients: artifact_gaussian transforms pairs of hashes, got an odd number, ", c.k));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t j = 0; j < c.k; ++j) {
      const int64_t value = c.at(r, j), least = r == 0 ? 1 : 0;
      if (value < least || value >= p)
        throw std::invalid_argument(
            message("coefficients[", r, ", ", j, "] is ", value, ", expected ", least, " <= value < ", p));
    }

  k_ = static_cast<int>(c.k);
  k_padded_ = static_cast<int>(round_up(c.k, 16));
  rows_ = AlignedBuffer<uint32_t>(int64_t{4} * k_padded_);
  for (int j = 0; j < k_; ++j) {
    const auto put = [&](int row, uint32_t value) {
      rows_.data()[int64_t{row} * k_padded_ + (artifact ? j : hash_slot(j))] = value;
    };
    if (artifact) {
      for (int r = 0; r < 2; ++r) {
        put(r, static_cast<uint32_t>(c.at(r, j)));
        put(2 + r, float_bits(static_cast<double>(c.at(r, j)) / p));
      }
    } else {
      for (int r = 0; r < 4; ++r) put(r, 2 * static_cast<uint32_t>(c.at(r, j)));
    }
  }
}

Decoder::Decoder(Encoder encoder, const std::vector<LinearWeights>& layers, Activation activation,
                 Activation last)
    : encoder_(std::move(encoder)) {
  if (layers.empty()) throw std::invalid_argument("weights: expected at least one layer");
  int64_t inputs = encoder_.view().k;
  for (size_t l = 0; l < layers.size(); ++l) {
    const LinearWeights& w = layers[l];
    if (w.inputs != inputs)
      throw std::invalid_argument(message("weights[", l, "]: expected ", inputs, " inputs, got ", w.inputs));
    if (w.outputs < 1 || w.outputs > largest_size)
      throw std::invalid_argument(
          message("weights[", l, "]: expected 1 to ", largest_size, " outputs, got ", w.outputs));
    inputs = w.outputs;
  }
  for (const LinearWeights& w : layers) {
    weights_.push_back(pack(w));
    biases_.emplace_back(round_up(w.outputs, 2 * panel_columns));
    for (int64_t o = 0; o < w.outputs; ++o) biases_.back().data()[o] = w.bias[o * w.bias_stride];
    layers_.push_back({weights_.back().data(), biases_.back().data(), static_cast<int>(w.inputs),
                       static_cast<int>(w.outputs), layers_.size() + 1 == layers.size() ? last : activation});
    widest_ = std::max(widest_, static_cast<int>(w.outputs));
  }
}

DecoderView Decoder::view() const {
  return {encoder_.view(), layers_.data(), static_cast<int>(layers_.size()), layers_.back().outputs, widest_};
}

int64_t Decoder::nbytes() const {
  int64_t floats = 0;
  for (const auto& w : weights_) floats += w.size();
  for (const auto& b : biases_) floats += b.size();
  return floats * static_cast<int64_t>(sizeof(float)) + encoder_.nbytes();
}

}  // namespace mprec
