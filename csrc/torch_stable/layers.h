// Linear layers as operators take them, checked: weights [out, in] and biases [out] of float32.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dhe/decoder.h"
#include "torch_stable/tensors.h"

namespace mprec::stable {

inline Activation activation_of(const std::string& text, const Name& name) {
  static constexpr const char* names[] = {"none", "relu", "sigmoid", "mish"};
  return static_cast<Activation>(code(4, [](int i) { return names[i]; }, text, name));
}

class Layers {
 public:
  // Of `count` layers, the first of which takes `inputs` numbers. `input`: what their dtype is to be the same
  // as; null: that of the first weight. `t`: a decoder's place among several, or -1.
  Layers(const Tensor* weights, const Tensor* biases, int64_t count, int64_t inputs, const View* input,
         int64_t t) {
    for (int64_t layer = 0; layer < count; ++layer) {
      const Name name{"weights", layer, t}, here{"layer", -1, t};
      const View weight = contiguous(weights[layer], name),
                 bias = contiguous(biases[layer], {"biases", layer, t});
      if (!input) {
        check_ndim(weight, name, 2);
        check_floats(weight, name);
      }
      const ScalarType dtype = input ? input->dtype : views_.empty() ? weight.dtype : views_.front().dtype;
      if (weight.dtype != dtype || bias.dtype != dtype) {
        const std::string wanted = input ? dtype_name(dtype) + " as input"
                                         : "weight " + dtype_name(dtype) + " and bias " + dtype_name(dtype);
        throw refusal(here, " ", layer, ": expected ", wanted, ", got weight ", dtype_name(weight.dtype),
                      ", bias ", dtype_name(bias.dtype));
      }
      if (weight.ndim() != 2 || weight.shape[1] != inputs || bias.ndim() != 1 ||
          bias.shape[0] != weight.shape[0])
        throw refusal(here, " ", layer, ": expected weight [out, ", inputs, "] and bias [out], got ",
                      list(weight.shape), " and ", list(bias.shape));
      check_float32(weight, name);
      inputs = weight.shape[0];
      views_.push_back(weight);
      views_.push_back(bias);
    }
  }

  // Weight and bias of each layer in turn; contiguous.
  const std::vector<View>& views() const { return views_; }

  // The layers, of copies of the views' bytes.
  std::vector<LinearWeights> linear(const std::vector<char>* copies) const {
    std::vector<LinearWeights> layers;
    for (size_t i = 0; i < views_.size(); i += 2) {
      const int64_t outputs = views_[i].shape[0], inputs = views_[i].shape[1];
      layers.push_back({reinterpret_cast<const float*>(copies[i].data()), outputs, inputs, inputs, 1,
                        reinterpret_cast<const float*>(copies[i + 1].data()), 1});
    }
    return layers;
  }

 private:
  std::vector<View> views_;
};

}  // namespace mprec::stable
