// Gradients of the decoder's weights and biases from the activations that were kept. Encodings are made
// again: they are larger than all activations, and quickly made.
//
//     dz_l = dy_l f_l'(z_l)      db_l += sum of rows of dz_l      dW_l += dz_l^T y_l      dy_l-1 = dz_l W_l
#pragma once
#include "dhe/gemm.h"
#include "dhe/hash.h"

namespace mprec::MPREC_ISA {

inline Vec sigmoid_slope(Vec y) { return y * (broadcast(1.0f) - y); }

inline Vec mish_slope(Vec z) {
  const Vec one = broadcast(1.0f), two = broadcast(2.0f), e = exp(lesser(broadcast(20.0f), z));
  const Vec n = e * (e + two), t = n / (n + two);
  return fma(z * (e / (one + e)), one - t * t, t);
}

template <Vec (*slope)(Vec)>
inline void multiply_by(const float* z, float* gradient, int count) {
  for (int j = 0; j < count; j += Vec::width) store(gradient + j, load(gradient + j) * slope(load(z + j)));
}

// z: the layer's sums, or its values where these tell the slope (keeps_sums).
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

// dW does not stay in the caches from one call to the next. Its rows are pages apart, where the processor
// does not see what comes next: so a tile's lines are fetched before the tile that comes before it.
inline void fetch_tile(const float* out, int64_t pitch, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < tile_columns; c += 16)
      prefetch_l2(reinterpret_cast<const char*>(out + r * pitch + c));
}

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
    const float* const in = dz + o / block_columns * block_stride + o % block_columns;
    for (int column = 0; column < inputs; column += tile_columns) {
      const int tiles = (rows + tile_rows - 1) / tile_rows;
      float* const out = to.weight + o * to.pitch + first_input + column;
      t.weights = y + column;
      t.ahead = {reinterpret_cast<const char*>(t.weights), 0};  // in the cache
      for (int i = 0; i < tiles; ++i) {
        const int begin = rows * i / tiles, end = rows * (i + 1) / tiles;
        const bool last = column + tile_columns >= inputs;
        if (!last) fetch_tile(out + begin * to.pitch + tile_columns, to.pitch, end - begin);
        t.in = in + begin;
        t.out = out + begin * to.pitch;
        run_tile<OuterProduct, tile_rows, tile_vectors>(end - begin, t);
      }
    }
  }
}

// Blocks of a layer's sums z and values y. One and the same if the values tell the slopes.
template <class Float>
struct LayerBlocks {
  Float *z, *y;
};

template <class Float>
inline LayerBlocks<Float> layer_blocks(const DecoderView& d, int layer, Float* kept, int64_t block_stride) {
  for (int l = 0; l < layer; ++l)
    kept += (keeps_sums(d.layers[l]) ? 2 : 1) * blocks_of(d.layers[l].outputs) * block_stride;
  const LayerView& of = d.layers[layer];
  return {kept, keeps_sums(of) ? kept + blocks_of(of.outputs) * block_stride : kept};
}

static inline void backward(const DecoderView& d, const LayerView* transposed, const int64_t* ids, int n,
                            const float* kept, int64_t kept_stride, const float* grad, int64_t grad_stride,
                            const WeightGradient* to, float* scratch) {
  const int64_t block_stride = int64_t{backward_ids} * block_pitch;
  float* hashes = scratch;
  float* dz = hashes + block_stride;
  float* dy = dz + blocks_of(d.widest) * block_stride;
  const auto block_count = [](int columns, int first) {
    return columns - first < block_columns ? columns - first : block_columns;
  };

  for (int i = 0; i < n; ++i)
    for (int c = 0; c < d.dim; ++c)
      dz[c / block_columns * block_stride + i * block_pitch + c % block_columns] = grad[i * grad_stride + c];
  for (int l = d.num_layers - 1; l >= 0; --l) {
    const LayerView& layer = d.layers[l];
    const float* slopes = layer_blocks(d, l, kept, kept_stride).z;
    if (to[l].fresh)
      for (int c = 0; c < layer.outputs; ++c) to[l].bias[c] = 0.0f;
    for (int c = 0; c < layer.outputs; c += block_columns) {
      const int count = block_count(layer.outputs, c);
      float* block = dz + c / block_columns * block_stride;
      const float* z = slopes + c / block_columns * kept_stride;
      for (int i = 0; i < n; ++i) {
        multiply_by_slope(layer.activation, z + i * block_pitch, block + i * block_pitch, count);
        for (int j = 0; j < count; ++j) to[l].bias[c + j] += block[i * block_pitch + j];
      }
    }
    for (int k0 = 0; k0 < layer.inputs; k0 += block_columns) {
      const int count = block_count(layer.inputs, k0);
      if (l == 0) encode_block(d.encoder, ids, n, k0, count, hashes, block_pitch);
      const float* y =
          l == 0 ? hashes : layer_blocks(d, l - 1, kept, kept_stride).y + k0 / block_columns * kept_stride;
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
