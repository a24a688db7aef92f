// The kernels of dense.h for the ISA of the including file.
#pragma once
#include "dense/dense.h"
#include "dense/interaction.h"
#include "dense/quantised.h"
#include "dense/tiles.h"
#include "dhe/bf16.h"
#include "dhe/gemm.h"
#include "dhe/math.h"

namespace mprec::MPREC_ISA {

inline void copy_floats(const float* from, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + Vec::width <= count; j += Vec::width) store(to + j, load(from + j));
  if (j < count) store(to + j, load(from + j, Mask(count - j)), Mask(count - j));
}

static inline void gather(const float* rows, int64_t stride, int samples, int columns, float* blocks,
                          int64_t block_stride, int first_column) {
  for (int c = 0; c < columns;) {
    const int column = first_column + c, offset = column % block_columns;
    const int count = columns - c < block_columns - offset ? columns - c : block_columns - offset;
    float* const block = blocks + column / block_columns * block_stride + offset;
    for (int s = 0; s < samples; ++s) copy_floats(rows + s * stride + c, count, block + s * block_pitch);
    c += count;
  }
}

static inline void scatter(const float* blocks, int64_t block_stride, int samples, int columns, float* rows,
                           int64_t stride) {
  for (int c = 0; c < columns; c += block_columns) {
    const int count = columns - c < block_columns ? columns - c : block_columns;
    const float* const block = blocks + c / block_columns * block_stride;
    for (int s = 0; s < samples; ++s) copy_floats(block + s * block_pitch, count, rows + s * stride + c);
  }
}

// Dot products of `rows` samples with a layer's only row of weights, one sample after another in `sums`.
template <int rows>
inline void dot_rows(const LayerView& layer, const float* in, int64_t block_stride, float* sums) {
  const float* weights = static_cast<const float*>(layer.weights);
  Vec acc[rows][2];
  for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = zero();
  for (int k0 = 0; k0 < layer.inputs; k0 += block_columns, in += block_stride) {
    const int count = layer.inputs - k0 < block_columns ? layer.inputs - k0 : block_columns;
    int k = 0;
    for (; k + 2 * Vec::width <= count; k += 2 * Vec::width)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Vec w = load(weights + k0 + k + half * Vec::width);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
          acc[r][half] = fma(load(in + r * block_pitch + k + half * Vec::width), w, acc[r][half]);
      }
    for (; k < count; k += Vec::width) {
      const Mask mask(count - k < Vec::width ? count - k : Vec::width);
      const Vec w = load(weights + k0 + k, mask);
      for (int r = 0; r < rows; ++r) acc[r][0] = fma(load(in + r * block_pitch + k, mask), w, acc[r][0]);
    }
  }
  for (int r = 0; r < rows; ++r) sums[r] = sum(acc[r][0] + acc[r][1]) + layer.bias[0];
}

// A layer of one output.
inline void single_output(const LayerView& layer, int samples, const float* in, float* out,
                          int64_t block_stride) {
  alignas(64) float sums[(max_samples + 15) / 16 * 16];
  int s = 0;
  for (; s + 4 <= samples; s += 4) dot_rows<4>(layer, in + s * block_pitch, block_stride, sums + s);
  for (; s < samples; ++s) dot_rows<1>(layer, in + s * block_pitch, block_stride, sums + s);
  for (; s % Vec::width; ++s) sums[s] = 0.0f;
  activate(layer.activation, sums, samples);
  for (s = 0; s < samples; ++s) out[s * block_pitch] = sums[s];
}

// A layer in fewer bits, by tiles where the ISA has them: all but the weights' way from memory is then cheap,
// and few samples have nothing to gain.
template <class Product>
inline void low_precision_layer(const DenseLayer& layer, int samples, bool backwards, float* in, float* out,
                                int64_t block_stride, const DenseLayer* next) {
#if defined(MPREC_TILES)
  if (samples > few_rows && layer.inputs <= most_tiled_inputs)
    return next_layer_by_tiles<Product>(layer, samples, in, out, block_stride);
#endif
  next_layer<Product>(layer, samples, backwards, in, out, block_stride, next);
}

static inline float* mlp(const MlpView& view, int samples, bool backwards, float* in, float* spare,
                         int64_t block_stride) {
  for (int l = 0; l < view.num_layers; ++l) {
    const DenseLayer& layer = view.layers[l];
    const DenseLayer* const next = l + 1 < view.num_layers ? &layer + 1 : nullptr;
    if (layer.outputs == 1)
      single_output(layer, samples, in, spare, block_stride);
    else if (layer.precision == Precision::int8)
      low_precision_layer<QuantisedProduct>(layer, samples, backwards, in, spare, block_stride, next);
    else if (layer.precision == Precision::bfloat16)
      low_precision_layer<BFloatProduct>(layer, samples, backwards, in, spare, block_stride, next);
    else
      next_layer<FloatProduct<float>>(layer, samples, backwards, in, spare, block_stride, next);
    float* const result = spare;
    spare = in;
    in = result;
  }
  return in;
}

static inline void mix(const MixTerm* terms, int64_t num_terms, int dim, const float* parts,
                       int64_t parts_stride, int samples, float* vectors, int64_t stride) {
  for (int s = 0; s < samples; ++s)
    for (int64_t begin = 0, end = 0; begin < num_terms; begin = end) {
      const int vector = terms[begin].vector;
      while (end < num_terms && terms[end].vector == vector) ++end;
      for (int c = 0; c < dim; c += Vec::width) {
        const Mask mask(dim - c < Vec::width ? dim - c : Vec::width);
        Vec sum = zero();
        for (int64_t i = begin; i < end; ++i) {
          const float* const part = parts + s * parts_stride + int64_t{terms[i].part} * dim + c;
          sum = fma(broadcast(terms[i].weight), load(part, mask), sum);
        }
        store(vectors + s * stride + int64_t{vector} * dim + c, sum, mask);
      }
    }
}

extern const DenseKernels dense_kernels = {gather, scatter, mlp, interact, interact_backward, mix};

}  // namespace mprec::MPREC_ISA
