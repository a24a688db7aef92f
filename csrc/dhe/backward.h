// Gradients of the decoder's weights and biases. Encodings and activations of a block of IDs are made again,
// used, and forgotten: nothing is kept from the forward pass.
//
//     dz_l = dy_l f_l'(z_l)      db_l += sum of rows of dz_l      dW_l += dz_l^T y_l      dy_l-1 = dz_l W_l
#pragma once
#include "dhe/gemm.h"
#include "dhe/hash.h"

namespace mprec::MPREC_ISA {

inline Vec sigmoid_slope(Vec z) {
  const Vec s = sigmoid(z);
  return s * (broadcast(1.0f) - s);
}

inline Vec mish_slope(Vec z) {
  const Vec one = broadcast(1.0f), two = broadcast(2.0f), e = exp(lesser(broadcast(20.0f), z));
  const Vec n = e * (e + two), t = n / (n + two);
  return fma(z * (e / (one + e)), one - t * t, t);
}

template <Vec (*slope)(Vec)>
inline void multiply_by(const float* z, float* gradient, int count) {
  for (int j = 0; j < count; j += Vec::width) store(gradient + j, load(gradient + j) * slope(load(z + j)));
}

inline void multiply_by_slope(Activation activation, const float* z, float* gradient, int count) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu:
      for (int j = 0; j < count; ++j) gradient[j] = z[j] <= 0 ? 0.0f : gradient[j];
      return;
    case Activation::sigmoid: return multiply_by<sigmoid_slope>(z, gradient, count);
    case Activation::mish: return multiply_by<mish_slope>(z, gradient, count);
  }
}

// gradient^T times inputs: a tile's rows are columns of the gradient, and its steps are IDs.
struct OuterProduct : FloatProduct<float> {
  static constexpr int row_pitch = 1, step_pitch = block_pitch, weight_pitch = block_pitch;
};

// Rows of dW that are summed along their whole length before the next: their pages stay at hand, and the
// part of dz that makes them stays in the L1 cache.
constexpr int outer_rows = 64;

// Sums dz^T y in dW for `inputs` columns of y from `first_input` on; dz in blocks, y in one.
inline void add_outer_product(const float* dz, int outputs, const float* y, int first_input, int inputs,
                              int n, int64_t block_stride, const WeightGradient& to) {
  alignas(64) static constexpr float zeros[tile_columns] = {};
  TileArguments<OuterProduct> t{};
  t.bias = to.fresh ? zeros : nullptr;
  t.panel_stride = panel_columns;
  t.steps = n;
  t.out_pitch = to.pitch;
  for (int o = 0; o < outputs; o += outer_rows) {
    const int rows = outputs - o < outer_rows ? outputs - o : outer_rows;
    t.in = dz + o / block_columns * block_stride + o % block_columns;
    for (int column = 0; column < inputs; column += tile_columns) {
      t.weights = y + column;
      t.out = to.weight + o * to.pitch + first_input + column;
      run_tiles<OuterProduct, tile_vectors>(rows, OuterProduct::row_pitch, t);
    }
  }
}

// Blocks of a layer's sums z and values y. One and the same if the values tell the slopes.
struct LayerBlocks {
  float *z, *y;
};

static inline void backward(const DecoderView& d, const LayerView* transposed, const int64_t* ids, int n,
                            const float* grad, int64_t grad_stride, const WeightGradient* to,
                            float* scratch) {
  const int64_t block_stride = int64_t{max_ids} * block_pitch;
  float* hashes = scratch;
  float* dz = hashes + block_stride;
  float* dy = dz + blocks_of(d.widest) * block_stride;
  float* kept = dy + blocks_of(d.widest) * block_stride;
  const auto blocks = [&](int l) {  // of layer l
    float* z = kept;
    for (int i = 0; i < l; ++i) z += 2 * blocks_of(d.layers[i].outputs) * block_stride;
    const Activation f = d.layers[l].activation;
    const bool one = f == Activation::none || f == Activation::relu;
    return LayerBlocks{z, one ? z : z + blocks_of(d.layers[l].outputs) * block_stride};
  };
  const auto block_count = [](int columns, int first) {
    return columns - first < block_columns ? columns - first : block_columns;
  };

  for (int l = 0; l < d.num_layers; ++l) {
    const LayerBlocks b = blocks(l);
    LayerView layer = d.layers[l];
    if (b.z != b.y) layer.activation = Activation::none;
    for (int k0 = 0; k0 < layer.inputs; k0 += block_columns) {
      const int count = block_count(layer.inputs, k0);
      if (l == 0) encode_block(d.encoder, ids, n, k0, count, hashes, block_pitch);
      const float* in = l == 0 ? hashes : blocks(l - 1).y + k0 / block_columns * block_stride;
      multiply_block<FloatProduct<float>>(layer, k0, count, in, n, b.z, block_stride);
    }
    if (b.z == b.y || l + 1 == d.num_layers) continue;  // the last layer's values are not needed
    for (int64_t j = 0; j < blocks_of(layer.outputs) * block_stride; ++j) b.y[j] = b.z[j];
    activate_layer(d.layers[l], n, b.y, block_stride);
  }

  for (int i = 0; i < n; ++i)
    for (int c = 0; c < d.dim; ++c)
      dz[c / block_columns * block_stride + i * block_pitch + c % block_columns] = grad[i * grad_stride + c];
  for (int l = d.num_layers - 1; l >= 0; --l) {
    const LayerView& layer = d.layers[l];
    if (to[l].fresh)
      for (int c = 0; c < layer.outputs; ++c) to[l].bias[c] = 0.0f;
    for (int c = 0; c < layer.outputs; c += block_columns) {
      const int count = block_count(layer.outputs, c);
      float* block = dz + c / block_columns * block_stride;
      const float* z = blocks(l).z + c / block_columns * block_stride;
      for (int i = 0; i < n; ++i) {
        multiply_by_slope(layer.activation, z + i * block_pitch, block + i * block_pitch, count);
        for (int j = 0; j < count; ++j) to[l].bias[c + j] += block[i * block_pitch + j];
      }
    }
    for (int k0 = 0; k0 < layer.inputs; k0 += block_columns) {
      const int count = block_count(layer.inputs, k0);
      if (l == 0) encode_block(d.encoder, ids, n, k0, count, hashes, block_pitch);
      const float* y = l == 0 ? hashes : blocks(l - 1).y + k0 / block_columns * block_stride;
      add_outer_product(dz, layer.outputs, y, k0, count, n, block_stride, to[l]);
    }
    if (l == 0) break;
    for (int c = 0; c < layer.outputs; c += block_columns)
      multiply_block<FloatProduct<float>>(transposed[l], c, block_count(layer.outputs, c),
                                          dz + c / block_columns * block_stride, n, dy, block_stride);
    float* swapped = dz;
    dz = dy;
    dy = swapped;
  }
}

}  // namespace mprec::MPREC_ISA
