// The dense half of a ranking model: MLPs, and the dot products of all pairs of a sample's vectors. What the
// kernels see: plain pointers and sizes. README.md has the formulas.
#pragma once
#include <cstdint>

#include "dhe/dhe.h"

namespace mprec {

// Samples that one call takes. Their activations lie as a decoder's do, [block of 256 columns][sample][272]
// floats (dhe.h), so that the decoder's matrix product serves here too; `block_stride` floats from block to
// block.
constexpr int max_samples = 2 * max_ids;
constexpr int64_t sample_block_stride = int64_t{max_samples} * block_pitch;

// A layer's weights, and its inputs, which are rounded in place, in float32, bfloat16 or int8 (quantised.h).
// A layer of a single output is a row of float32 weights, [inputs]: in a panel of 16 columns it would cost 16
// times as much.
struct DenseLayer : LayerView {
  Precision precision;
};

struct MlpView {
  const DenseLayer* layers;
  int num_layers;
  int widest;                      // of all inputs and outputs
  int64_t multiply_adds() const {  // per sample
    int64_t sum = 0;
    for (int l = 0; l < num_layers; ++l) sum += int64_t{layers[l].inputs} * layers[l].outputs;
    return sum;
  }
};

// The products of vectors i and j < i (j <= i with self-interaction), in the order (1,0) (2,0) (2,1) (3,0).
struct InteractionView {
  int vectors, dim;
  bool self;
  [[gnu::always_inline]] int64_t products() const {
    return int64_t{vectors} * (vectors - 1) / 2 + (self ? vectors : 0);
  }
  // Floats that a sample's vectors take transposed. One line more than they fill: gcc 12 makes vectors of the
  // scalar kernel's loads that reach into the next line.
  [[gnu::always_inline]] int64_t transposed_floats() const {
    return int64_t{(vectors + 15) / 16 * 16} * (dim + 1);
  }
};

// A vector that interacts is a weighted sum of a sample's embedded vectors.
struct MixTerm {
  int vector, part;
  float weight;
};

// What turns pooled codes of a table of low rank into a vector: codes @ matrix + ones * bias.
struct ProjectionView {
  int rank, dim;
  const float* matrix;  // [rank][dim]
  const float* bias;    // [dim], or null
};

// Vectors of a sample, or of several in turn: number 0 at `first`, those from 1 on at `others`.
template <class Number>
struct VectorsOf {
  Number *first, *others;
};
using Vectors = VectorsOf<const float>;

struct DenseKernels {
  // `columns` numbers of each sample, in rows `stride` apart, into blocks from `first_column` on; and back.
  void (*gather)(const float* rows, int64_t stride, int samples, int columns, float* blocks,
                 int64_t block_stride, int first_column);
  void (*scatter)(const float* blocks, int64_t block_stride, int samples, int columns, float* rows,
                  int64_t stride);
  // The MLP's outputs, in `in` or in `spare`, which is what is returned; both are overwritten. Weights of few
  // samples are read from the last column to the first if `backwards`: every second call should.
  float* (*mlp)(const MlpView&, int samples, bool backwards, float* in, float* spare, int64_t block_stride);
  // vectors[sample * stride + vector * dim]: the products, into blocks from `first_column` on. `transposed`
  // has room for one sample's vectors.
  void (*interact)(const InteractionView&, const float* vectors, int64_t stride, int samples,
                   float* transposed, float* blocks, int64_t block_stride, int first_column);
  // The gradients of one sample's vectors from those of their products.
  void (*interact_backward)(const InteractionView&, const Vectors& vectors, const float* grad,
                            const VectorsOf<float>& out);
  // Vector v of a sample: the sum of its terms, which follow each other. Every vector has a term.
  void (*mix)(const MixTerm* terms, int64_t num_terms, int dim, const float* parts, int64_t parts_stride,
              int samples, float* vectors, int64_t stride);
  // Vectors of samples from their codes; ones: of each sample, how often the bias counts.
  void (*project)(const ProjectionView&, const float* codes, int64_t codes_stride, const float* ones,
                  int samples, float* vectors, int64_t stride);
};

}  // namespace mprec
