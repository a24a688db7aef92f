// An MLP's weights, checked and packed once into what the kernels read.
#pragma once
#include <vector>

#include "common/aligned.h"
#include "dense/dense.h"
#include "dhe/decoder.h"

namespace mprec {

class Mlp {
 public:
  // One activation for each layer. A null bias is zeros. float32 or bfloat16: weights and inputs of all
  // layers but those of one output. std::invalid_argument if there is no layer or sizes do not chain.
  Mlp(const std::vector<LinearWeights>&, const std::vector<Activation>&,
      Precision precision = Precision::float32);
  // Valid while the Mlp stays where it is.
  MlpView view() const { return {layers_.data(), static_cast<int>(layers_.size()), widest_, precision_}; }
  int inputs() const { return layers_.front().inputs; }
  int outputs() const { return layers_.back().outputs; }
  int64_t nbytes() const;

 private:
  Precision precision_;
  std::vector<AlignedBuffer<char>> weights_;
  std::vector<AlignedBuffer<float>> biases_;
  std::vector<LayerView> layers_;
  int widest_ = 0;
};

}  // namespace mprec
