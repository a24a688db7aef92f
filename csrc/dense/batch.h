// MLPs and interactions of whole batches, over threads: what operators call.
#pragma once
#include <cstdint>

#include "dense/dense.h"

namespace mprec {

// Rows of numbers, `stride` apart.
struct Rows {
  float* data;
  int64_t stride;
};

// out[sample] = the MLP of in[sample].
void mlp_forward(const MlpView&, Rows in, int64_t samples, Rows out, int threads);
// Vectors [samples][vectors][dim] to products [samples][products]: without `first`, `others` are all. With
// `first` [samples][dim], that is in front of the products.
void interaction_forward(const InteractionView&, const Vectors&, int64_t samples, Rows out, int threads);
// From grad, a row of products (with `first` in front of them) for each sample, to `out`, of which there are
// `first` and `others` as in vectors.
void interaction_backward(const InteractionView&, const Vectors&, const float* grad, int64_t samples,
                          const VectorsOf<float>& out, int threads);

}  // namespace mprec
