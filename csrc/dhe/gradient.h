// Gradients of a decoder over many IDs and threads.
#pragma once
#include <cstdint>
#include <vector>

#include "dhe/decoder.h"

namespace mprec {

// Where a layer's gradients go: weight [outputs, inputs] and bias [outputs], contiguous; overwritten.
struct LayerGradient {
  float *weight, *bias;
};

// `grad` [n, dim] is the gradient of the vectors of `ids` [n], none negative (IdError). `linear` are the
// weights that the decoder was made of; std::invalid_argument if they have other sizes, or it is not float32.
// Sums run over the IDs in order within each thread's share, and over the threads in order: for a fixed
// number of threads the result is the same at every call.
// `kept`: the activations of the IDs (dhe.h), blocks `kept_stride` apart; null: they are made again.
void dhe_backward(const DecoderView&, const std::vector<LinearWeights>& linear, const int64_t* ids, int64_t n,
                  const float* kept, int64_t kept_stride, const float* grad,
                  const std::vector<LayerGradient>& to, int threads);

}  // namespace mprec
