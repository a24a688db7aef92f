#include "dhe/decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/error.h"
#include "dhe/pack.h"

namespace mprec {
namespace {

constexpr int64_t largest_size = int64_t{1} << 20;  // of a layer: sizes and offsets then fit everywhere

uint32_t float_bits(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

}  // namespace

Encoder::Encoder(const CoefficientMatrix& c, HashFamily family) : family_(family) {
  const FamilyTraits& family_traits = traits(family);
  const bool artifact = family_traits.artifact;
  const int64_t expected_rows = artifact ? 2 : 4, p = artifact ? artifact_p : mersenne_p;
  if (c.rows != expected_rows)
    throw std::invalid_argument(
        message("coefficients: expected ", expected_rows, " rows for this hash family, got ", c.rows));
  if (c.k < 1 || c.k > largest_size)
    throw std::invalid_argument(message("coefficients: expected 1 to ", largest_size, " columns, got ", c.k));
  if (c.k % family_traits.together != 0)
    throw std::invalid_argument(message("coefficients: ", family_traits.name, " transforms ",
                                        family_traits.together, " hashes together, got ", c.k));
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
                 Activation last, Precision precision)
    : encoder_(std::move(encoder)), precision_(precision) {
  const FamilyTraits& family = traits(encoder_.view().family);
  if (precision == Precision::int8 && family.int8_unit == 0)
    throw std::invalid_argument(message("precision: int8 is not for hash family ", family.name));
  if (precision == Precision::lut && family.lut_magnitude == 0)
    throw std::invalid_argument(message("precision: lut is not for hash family ", family.name));
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
  for (size_t l = 0; l < layers.size(); ++l) {
    const LinearWeights& w = layers[l];
    const int64_t columns = round_up(w.outputs, lut_columns);
    AlignedBuffer<float> scale(columns), bias(columns);
    for (int64_t o = 0; o < w.outputs; ++o) bias.data()[o] = w.bias[o * w.bias_stride];
    if (precision == Precision::float16) {
      if (!fits_float16(w))
        throw std::invalid_argument(message("weights[", l, "]: a value is beyond float16's 65504"));
      weights_.push_back(pack_float16(w));
    } else if (precision == Precision::bfloat16) {
      weights_.push_back(pack_bfloat16(w));
    } else if (l == 0 && precision == Precision::int8) {
      // u = (2 level - 127) unit.
      AlignedBuffer<float> sums(columns);
      weights_.push_back(pack_int8(w, scale.data(), sums.data()));
      for (int64_t o = 0; o < w.outputs; ++o) {
        bias.data()[o] -= 127.0f * family.int8_unit * scale.data()[o] * sums.data()[o];
        scale.data()[o] *= 2.0f * family.int8_unit;
      }
    } else if (l == 0 && precision == Precision::lut) {
      weights_.push_back(pack_tables(w, family.lut_magnitude, scale.data(), bias.data()));
    } else {
      weights_.push_back(pack_float32(w));
    }
    scales_.push_back(std::move(scale));
    biases_.push_back(std::move(bias));
    layers_.push_back({weights_[l].data(), scales_[l].data(), biases_[l].data(), static_cast<int>(w.inputs),
                       static_cast<int>(w.outputs), l + 1 == layers.size() ? last : activation});
    widest_ = std::max(widest_, static_cast<int>(w.outputs));
  }
}

DecoderView Decoder::view() const {
  return {encoder_.view(),        layers_.data(), static_cast<int>(layers_.size()),
          layers_.back().outputs, widest_,        precision_};
}

int64_t Decoder::nbytes() const {
  int64_t bytes = encoder_.nbytes();
  for (const auto& w : weights_) bytes += w.size();
  for (const auto& b : biases_) bytes += b.size() * static_cast<int64_t>(sizeof(float));
  if (precision_ == Precision::int8 || precision_ == Precision::lut)
    bytes += scales_[0].size() * static_cast<int64_t>(sizeof(float));
  return bytes;
}

}  // namespace mprec
