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
// vectors [samples][vectors][dim] to products [samples][products].
void interaction_forward(const InteractionView&, const float* vectors, int64_t samples, Rows out,
                         int threads);
void interaction_backward(const InteractionView&, const float* vectors, const float* grad, int64_t samples,
                          float* out, int threads);

}  // namespace mprec
