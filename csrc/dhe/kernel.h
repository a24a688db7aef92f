// The kernels of dhe.h for the ISA of the including file.
#pragma once
#include "dhe/backward.h"
#include "dhe/bf16.h"
#include "dhe/dhe.h"
#include "dhe/gemm.h"
#include "dhe/hash.h"
#include "dhe/int8.h"
#include "dhe/lut.h"

namespace mprec::MPREC_ISA {

inline void copy_row(const float* from, int count, float* to) {
  int j = 0;
  for (; j + Vec::width <= count; j += Vec::width) store(to + j, load(from + j));
  if (j < count) store(to + j, load(from + j, Mask(count - j)), Mask(count - j));
}

static inline void encode(const EncoderView& e, const int64_t* ids, int64_t n, float* out, int64_t stride) {
  alignas(64) float block[4 * block_pitch];
  for (int64_t i = 0; i < n; i += 4) {
    const int rows = static_cast<int>(n - i < 4 ? n - i : 4);
    for (int k0 = 0; k0 < e.k; k0 += block_columns) {
      const int count = e.k - k0 < block_columns ? e.k - k0 : block_columns;
      encode_block(e, ids + i, rows, k0, count, block, block_pitch);
      for (int r = 0; r < rows; ++r) copy_row(block + r * block_pitch, count, out + (i + r) * stride + k0);
    }
  }
}

template <class Hash, class Id>
void hash_one(const EncoderView& e, int64_t id, int64_t* out) {
  int32_t h[Vec::width];
  for (int k = 0; k < e.k; k += Vec::width) {
    store(h, Hash(e, k)(Id(id)));
    for (int j = 0; j < Vec::width && k + j < e.k; ++j) out[k + j] = h[j];
  }
}

static inline void hash(const EncoderView& e, const int64_t* ids, int64_t n, int64_t* out) {
  const bool artifact = is_artifact(e.family);
  for (int64_t i = 0; i < n; ++i, out += e.k) {
    if (artifact && ids[i] > artifact_exact_ids)
      for (int k = 0; k < e.k; ++k) out[k] = artifact_wrapped(e, k, ids[i]);
    else if (artifact)
      hash_one<ArtifactHash, ArtifactId>(e, ids[i], out);
    else if (one_limb(ids[i]))
      hash_one<UniversalHash<true>, Limbs<true>>(e, ids[i], out);
    else
      hash_one<UniversalHash<false>, Limbs<false>>(e, ids[i], out);
  }
}

// `encode_columns(k0, count, to)` makes a block of inputs at `to`, and returns that as what it is.
// Hashes never leave the cache: a block of them is made, multiplied and forgotten; all of them, of few IDs.
template <class Product, class Encode>
inline void first_layer(const DecoderView& d, int n, bool backwards, float* hashes, float* out,
                        int64_t block_stride, const Encode& encode_columns) {
  const int k = d.encoder.k, block = Product::block;
  const bool whole = n <= few_rows && n * ((k + block - 1) / block) <= max_ids;
  const typename Product::Input* first = nullptr;
  for (int k0 = 0; k0 < k; k0 += block) {
    const int count = k - k0 < block ? k - k0 : block;
    const auto* in = encode_columns(k0, count, hashes + (whole ? k0 / block * n * block_pitch : 0));
    if (k0 == 0) first = in;
    if (!whole) multiply_block<Product>(d.layers[0], k0, count, in, n, out, block_stride);
  }
  if (whole) multiply_few<Product>(d.layers[0], first, n, n, backwards, out, block_stride);
}

static inline void forward(const DecoderView& d, const int64_t* ids, int n, float* out, int64_t stride,
                           float* scratch) {
  const int64_t block_stride = int64_t{max_ids} * block_pitch;
  float* hashes = scratch;
  float* from = scratch + block_stride;
  float* to = from + blocks_of(d.widest) * block_stride;
  static thread_local bool backwards;  // every second call
  backwards = !backwards;

  const auto multiply_units = [&](auto product) {
    using Product = decltype(product);
    first_layer<Product>(d, n, backwards, hashes, to, block_stride, [&](int k0, int count, float* block) {
      encode_block(d.encoder, ids, n, k0, count, block, block_pitch);
      return Product::prepare(block, n, count);
    });
  };
  switch (d.precision) {
    case Precision::float32: multiply_units(FloatProduct<float>{}); break;
    case Precision::float16: multiply_units(FloatProduct<uint16_t>{}); break;
    case Precision::bfloat16: multiply_units(BFloatProduct{}); break;
    case Precision::int8:
      first_layer<Int8Product>(
          d, n, backwards, hashes, to, block_stride, [&](int k0, int count, float* block) {
            auto* levels = reinterpret_cast<uint8_t*>(block);
            hash_universal(d.encoder, ids, n, k0, count, StoreLevels{levels, level_pitch});
            return levels;
          });
      break;
    case Precision::lut: {
      const int64_t pitch = offset_pitch(d);
      auto* sums = reinterpret_cast<Words*>(to + blocks_of(d.widest) * block_stride);
      auto* offsets = reinterpret_cast<uint16_t*>(sums + 2 * max_ids);
      hash_universal(d.encoder, ids, n, 0, d.encoder.k, StoreOffsets{offsets, pitch});
      look_up(d.layers[0], offsets, pitch, n, sums, to, block_stride);
      break;
    }
  }
  for (int l = 1; l < d.num_layers; ++l) {
    float* swapped = from;
    from = to;
    to = swapped;
    switch (d.precision) {
      case Precision::float16:
        next_layer<FloatProduct<uint16_t>>(d.layers[l], n, backwards, from, to, block_stride);
        break;
      case Precision::bfloat16:
        next_layer<BFloatProduct>(d.layers[l], n, backwards, from, to, block_stride);
        break;
      default: next_layer<FloatProduct<float>>(d.layers[l], n, backwards, from, to, block_stride);
    }
  }
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < d.dim; c += block_columns) {
      const int count = d.dim - c < block_columns ? d.dim - c : block_columns;
      copy_row(to + c / block_columns * block_stride + i * block_pitch, count, out + i * stride + c);
    }
}

// The activations of `layer` from blocks that are `block_stride` apart to such blocks: its values `y`, and
// the sums that they are of where these are kept.
inline void keep_activation(const LayerView& layer, int n, LayerBlocks<float> to, int64_t block_stride) {
  if (to.z == to.y) return;
  for (int b = 0; b < blocks_of(layer.outputs); ++b)
    for (int i = 0; i < n * block_pitch; ++i) to.y[b * block_stride + i] = to.z[b * block_stride + i];
  activate_layer(layer, n, to.y, block_stride);
}

static inline void keep(const DecoderView& d, const int64_t* ids, int n, float* kept, int64_t block_stride,
                        float* scratch) {
  using Product = FloatProduct<float>;
  for (int begin = 0; begin < n; begin += max_ids) {
    const int rows = n - begin < max_ids ? n - begin : max_ids;
    const float* in = nullptr;
    for (int l = 0; l < d.num_layers; ++l) {
      const LayerBlocks<float> to = layer_blocks(d, l, kept + int64_t{begin} * block_pitch, block_stride);
      LayerView layer = d.layers[l];
      if (to.z != to.y) layer.activation = Activation::none;
      for (int k0 = 0; k0 < layer.inputs; k0 += block_columns) {
        const int count = layer.inputs - k0 < block_columns ? layer.inputs - k0 : block_columns;
        if (l == 0) encode_block(d.encoder, ids + begin, rows, k0, count, scratch, block_pitch);
        multiply_block<Product>(layer, k0, count, l == 0 ? scratch : in + k0 / block_columns * block_stride,
                                rows, to.z, block_stride, l + 1 < d.num_layers ? &d.layers[l + 1] : nullptr);
      }
      keep_activation(d.layers[l], rows, to, block_stride);
      in = to.y;
    }
  }
}

static inline void pool(const PoolArguments& p, int64_t begin, int64_t end, float* out) {
  for (int64_t j = 0; j < p.dim; ++j) out[j] = 0.0f;
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.row_of_entry ? p.row_of_entry[i] : i;
    if (row < 0) continue;
    const float* v = p.vectors + row * p.dim;
    const bool first = count++ == 0;
    if (p.mode == Mode::max)
      // NaN wins, as in torch.
      for (int64_t j = 0; j < p.dim; ++j) out[j] = first || v[j] > out[j] || v[j] != v[j] ? v[j] : out[j];
    else if (p.weights)
      for (int64_t j = 0; j < p.dim; ++j) out[j] += p.weights[i] * v[j];
    else
      for (int64_t j = 0; j < p.dim; ++j) out[j] += v[j];
  }
  if (p.mode == Mode::mean && count > 1)
    for (int64_t j = 0; j < p.dim; ++j) out[j] /= static_cast<float>(count);
}

extern const DheKernels dhe_kernels = {encode, hash, forward, keep, backward, pool};

}  // namespace mprec::MPREC_ISA
