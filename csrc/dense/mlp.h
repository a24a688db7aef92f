// An MLP's weights, checked and packed once into what the kernels read.
#pragma once
#include <vector>

#include "common/aligned.h"
#include "dense/dense.h"
#include "dhe/decoder.h"

namespace mprec {

class Mlp {
 public:
  // One activation for each layer. A null bias is zeros. float32, bfloat16 or int8: weights and inputs of all
  // layers but those of one output; int8 of fewer than 32 inputs, the raw numbers, are float32 too.
  // std::invalid_argument if there is no layer or sizes do not chain.
  Mlp(const std::vector<LinearWeights>&, const std::vector<Activation>&,
      Precision precision = Precision::float32);
  // Valid while the Mlp stays where it is.
  MlpView view() const { return {layers_.data(), static_cast<int>(layers_.size()), widest_}; }
  int inputs() const { return layers_.front().inputs; }
  int outputs() const { return layers_.back().outputs; }
  int64_t nbytes() const;

 private:
  std::vector<AlignedBuffer<char>> weights_;
  std::vector<AlignedBuffer<float>> biases_,
      scales_;  // a scale and a shift of each output, one after another
  std::vector<DenseLayer> layers_;
  int widest_ = 0;
};

}  // namespace mprec
