// Layers of an MLP as Python passes them, checked.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "common/error.h"
#include "dhe/decoder.h"
#include "python/tensor.h"

namespace mprec::python {

inline Tensor strided(PyObject* object, const char* name, DType dtype, int ndim) {
  const Tensor t = view(object, name);
  if (t.dtype != dtype)
    throw pybind11::type_error(
        message(name, ": expected ", dtype_name(dtype), ", got ", dtype_name(t.dtype)));
  if (t.ndim != ndim)
    throw pybind11::value_error(message(name, ": expected ", ndim, " dimension(s), got ", t.ndim));
  return t;
}

// Without biases.
inline std::vector<LinearWeights> matrices(const std::vector<pybind11::object>& weights) {
  std::vector<LinearWeights> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor w = strided(weights[l].ptr(), message("weights[", l, "]").c_str(), DType::f32, 2);
    layers.push_back({w.ptr<float>(), w.shape[0], w.shape[1], w.strides[0], w.strides[1], nullptr, 0});
  }
  return layers;
}

inline std::vector<LinearWeights> linear_layers(const std::vector<pybind11::object>& weights,
                                                const std::vector<pybind11::object>& biases) {
  if (weights.size() != biases.size())
    throw pybind11::value_error(
        message("biases: expected one for each of the ", weights.size(), " weights, got ", biases.size()));
  std::vector<LinearWeights> layers = matrices(weights);
  for (size_t l = 0; l < layers.size(); ++l) {
    const Tensor b = strided(biases[l].ptr(), message("biases[", l, "]").c_str(), DType::f32, 1);
    if (b.shape[0] != layers[l].outputs)
      throw pybind11::value_error(
          message("biases[", l, "]: expected ", layers[l].outputs, " values, got ", b.shape[0]));
    layers[l].bias = b.ptr<float>();
    layers[l].bias_stride = b.strides[0];
  }
  return layers;
}

inline std::vector<Activation> parse_activations(const std::vector<int>& activations) {
  std::vector<Activation> parsed;
  for (int a : activations) {
    if (a < 0 || a > 3) throw pybind11::value_error(message("activations: expected 0 to 3, got ", a));
    parsed.push_back(static_cast<Activation>(a));
  }
  return parsed;
}

}  // namespace mprec::python
