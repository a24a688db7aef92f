// Coefficients and weights, checked and packed once into what the kernels read.
#pragma once
#include <cstdint>
#include <vector>

#include "common/aligned.h"
#include "dhe/dhe.h"

namespace mprec {

// A matrix of int32 with any strides (in elements): hash coefficients [rows, k].
struct CoefficientMatrix {
  const int32_t* data;
  int64_t rows, k, row_stride, column_stride;
  int64_t at(int64_t row, int64_t j) const { return data[row * row_stride + j * column_stride]; }
};

// One nn.Linear: weight [outputs, inputs] with any strides (in elements), bias [outputs].
struct LinearWeights {
  const float* weight;
  int64_t outputs, inputs, output_stride, input_stride;
  const float* bias;
  int64_t bias_stride;
};

class Encoder {
 public:
  // std::invalid_argument for coefficients outside the family's ranges.
  Encoder(const CoefficientMatrix&, HashFamily);
  EncoderView view() const { return {rows_.data(), k_, k_padded_, family_}; }
  int64_t nbytes() const { return rows_.size() * static_cast<int64_t>(sizeof(uint32_t)); }

 private:
  AlignedBuffer<uint32_t> rows_;
  int k_, k_padded_;
  HashFamily family_;
};

class Decoder {
 public:
  // `activation` follows every layer but the last, `last` that one. std::invalid_argument if sizes do not
  // chain, or the precision does not go with the hash family or with the weights.
  Decoder(Encoder, const std::vector<LinearWeights>&, Activation activation, Activation last,
          Precision precision = Precision::float32);
  // Valid while the Decoder stays where it is.
  DecoderView view() const;
  const std::vector<LayerView>& layers() const { return layers_; }
  int64_t nbytes() const;

 private:
  Encoder encoder_;
  Precision precision_;
  std::vector<AlignedBuffer<char>> weights_;
  std::vector<AlignedBuffer<float>> scales_, biases_;
  std::vector<LayerView> layers_;
  int widest_ = 0;
};

}  // namespace mprec
