// MLPs, and the products of pairs of vectors.
#include <memory>
#include <vector>

#include "dense/batch.h"
#include "dense/mlp.h"
#include "torch_stable/kept.h"
#include "torch_stable/layers.h"
#include "torch_stable/operators.h"

namespace mprec::stable {

Tensor mlp(const Tensor& input, const Tensors& weights, const Tensors& biases, StringHandle activation,
           StringHandle last_activation) {
  const std::string names[] = {taken(activation), taken(last_activation)};
  const Activation between = activation_of(names[0], {"activation"}),
                   last = activation_of(names[1], {"last_activation"});
  if (weights.empty() || weights.size() != biases.size())
    throw refusal("weights, biases: expected one of each per layer, at least one layer, got ", weights.size(),
                  " and ", biases.size());
  const View in = contiguous(input, {"input"});
  if (in.ndim() != 2) {
    const Sizes first = weights[0].sizes();
    throw refusal("input: expected [B, ", first.empty() ? 0 : first[first.size() - 1], "], got ",
                  list(in.shape));
  }
  check_floats(in, {"input"});
  const auto count = static_cast<int64_t>(weights.size());
  const Layers layers(weights.data(), biases.data(), count, in.shape[1], &in, -1);

  static Kept<Mlp> kept;
  const auto number = [](auto value) { return static_cast<int64_t>(value); };
  const std::shared_ptr<const Mlp> packed = kept.get(layers.views(), {number(between), number(last), count},
                                                     [&](const std::vector<std::vector<char>>& copies) {
                                                       std::vector<Activation> activations(count, between);
                                                       activations.back() = last;
                                                       return Mlp(layers.linear(copies.data()), activations);
                                                     });
  const Matrix out = new_floats(in.shape[0], packed->outputs());
  // Kernels only read what Rows of inputs point to.
  mlp_forward(packed->view(), {const_cast<float*>(in.ptr<float>()), in.shape[1]}, in.shape[0],
              {reinterpret_cast<float*>(out.data), packed->outputs()}, threads());
  return out.tensor;
}

Tensor dot_interaction(const Tensor& vectors, bool self_interaction, const std::optional<Tensor>& first) {
  const View v = contiguous(vectors, {"vectors"});
  if (v.ndim() != 3) throw refusal("vectors: expected [B, V, D], got ", list(v.shape));
  check_floats(v, {"vectors"});
  check_float32(v, {"vectors"});
  constexpr int64_t most = 4096, longest = 1 << 20;
  if (v.shape[1] < 1 || v.shape[1] > most || v.shape[2] < 1 || v.shape[2] > longest)
    throw refusal("vectors: without Python 1 to ", most, " vectors of 1 to ", longest,
                  " numbers are served, got ", list(v.shape));
  std::optional<View> in_front;
  if (first) {
    in_front = contiguous(*first, {"first"});
    if (in_front->ndim() != 2 || in_front->shape[0] != v.shape[0] || in_front->shape[1] != v.shape[2])
      throw refusal("first: expected [", v.shape[0], ", ", v.shape[2], "], got ", list(in_front->shape));
    check_float32(*in_front, {"first"});
  }
  const InteractionView shape{static_cast<int>(v.shape[1]) + (first ? 1 : 0), static_cast<int>(v.shape[2]),
                              self_interaction};
  const int64_t columns = shape.products() + (first ? v.shape[2] : 0);
  const Matrix out = new_floats(v.shape[0], columns);
  interaction_forward(shape, {in_front ? in_front->ptr<float>() : nullptr, v.ptr<float>()}, v.shape[0],
                      {reinterpret_cast<float*>(out.data), columns}, threads());
  return out.tensor;
}

}  // namespace mprec::stable
