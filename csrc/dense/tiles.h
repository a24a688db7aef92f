// Layers in int8 and bfloat16 on an ISA with tiles (isa/amx.h): a product of tiles is 16 samples x 16 outputs
// x 64 or 32 inputs in 16 cycles, 8 and 16 times what its vector instructions do.
//
// Panels are tiles one after another as they are packed: 16 outputs' weights for 4 or 2 inputs are one row of
// 64 bytes. Two tiles of samples times two panels need 4 loads for 4 products, and a load takes half a
// product's time. Sums stay in their tiles over all inputs, and pass to the outputs' blocks through the L1
// cache.
//
// The last tile of samples overlaps the one before rather than being short. Of fewer than 16 samples, it has
// rows of a block that are no sample's: what they hold counts for nobody.
#pragma once
#include "dense/dense.h"
#include "dhe/gemm.h"

#if defined(MPREC_TILES)
namespace mprec::MPREC_ISA {

template <class Product>
struct TiledLayer {
  using Input = typename Product::Input;
  static constexpr int inputs_at_once = tile_bytes / int{sizeof(Input)},
                       steps_of_block = Product::block / inputs_at_once;
  static_assert(Product::pad == inputs_at_once);

  const LayerView& layer;
  const float* in;
  float* out;
  int64_t block_stride;

  // Two rows of tiles, or one, times `panels` of weights, from a column on.
  template <int heights, int panels>
  void multiply(int first_row, int second_row, int column, Ahead ahead) const {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
    constexpr int64_t row_bytes = block_pitch * sizeof(float);
    const int64_t stride = panel_stride<Product>(layer) * int64_t{sizeof(typename Product::Weight)};
    const auto* weights = reinterpret_cast<const char*>(weights_at<Product>(layer, column, 0));
    const int steps = (layer.inputs + inputs_at_once - 1) / inputs_at_once;
    for (int step0 = 0; step0 < steps; step0 += steps_of_block) {
      const float* block = in + int64_t{step0} * inputs_at_once / block_columns * block_stride;
      const auto* first = reinterpret_cast<const char*>(block + first_row * block_pitch);
      const auto* second = reinterpret_cast<const char*>(block + second_row * block_pitch);
      const int count = steps - step0 < steps_of_block ? steps - step0 : steps_of_block;
      for (int s = 0; s < count;
           ++s, first += tile_bytes, second += tile_bytes, weights += tile_height * tile_bytes) {
        load_tile<6>(weights, tile_bytes);
        load_tile<4>(first, row_bytes);
        multiply_tiles<0, 4, 6>(static_cast<const Input*>(nullptr));
        if constexpr (heights > 1) {
          load_tile<5>(second, row_bytes);
          multiply_tiles<2, 5, 6>(static_cast<const Input*>(nullptr));
        }
        if constexpr (panels > 1) {
          load_tile<7>(weights + stride, tile_bytes);
          multiply_tiles<1, 4, 7>(static_cast<const Input*>(nullptr));
        }
        if constexpr (heights > 1 && panels > 1) multiply_tiles<3, 5, 7>(static_cast<const Input*>(nullptr));
        for (int p = 0; p < panels; ++p)
          for (int line = 0; line < 4; ++line)
            prefetch_l2(ahead.weights + p * ahead.panel_stride + line * 64);
        ahead.weights += 4 * 64;
      }
    }
    finish<0>(first_row, column);
    if constexpr (panels > 1) finish<1>(first_row, column + panel_columns);
    if constexpr (heights > 1) finish<2>(second_row, column);
    if constexpr (heights > 1 && panels > 1) finish<3>(second_row, column + panel_columns);
  }

  // A tile of sums to the outputs of its samples.
  template <int tile>
  void finish(int first_row, int column) const {
    alignas(64) uint32_t sums[tile_height][tile_bytes / 4];
    store_tile<tile>(sums, tile_bytes);
    const TileColumns<Input> columns{layer.scale ? layer.scale + column : nullptr,
                                     layer.shift ? layer.shift + column : nullptr,
                                     reinterpret_cast<const Input*>(in + first_row * block_pitch), true};
    const Vec bias = load(layer.bias + column);
    float* const to =
        out + column / block_columns * block_stride + first_row * block_pitch + column % block_columns;
    const auto rows = [&](auto activation) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int r = 0; r < tile_height; ++r)
        store(to + r * block_pitch, activation(Product::of_tile(columns, load(sums[r]), bias, r)));
    };
    if (layer.activation == Activation::relu)
      rows([](Vec y) { return relu(y); });
    else
      rows([](Vec y) { return y; });
  }

  template <int panels>
  void multiply_columns(int rows, int column, Ahead ahead) const {
    const int heights = (rows + tile_height - 1) / tile_height,
              last = rows > tile_height ? rows - tile_height : 0;
    const auto row = [&](int i) { return i + 1 < heights ? i * tile_height : last; };
    const int64_t fetched = int64_t{layer.inputs} / inputs_at_once * 4 * 64;
    for (int i = 0; i < heights; i += 2) {
      Ahead part{ahead.weights + i / 2 * fetched, ahead.panel_stride};
      if (i + 1 < heights)
        multiply<2, panels>(row(i), row(i + 1), column, part);
      else
        multiply<1, panels>(row(i), 0, column, part);
    }
  }
};

// As next_layer, for more than few_rows. Integer sums of more inputs might not fit.
constexpr int most_tiled_inputs = 1 << 16;

template <class Product>
inline void next_layer_by_tiles(const LayerView& layer, int rows, float* in, float* out,
                                int64_t block_stride) {
  prepare_layer<Product>(in, rows, layer.inputs, block_stride);
  const WholeTiles configured;
  const TiledLayer<Product> tiled{layer, in, out, block_stride};
  for (int column = 0; column < layer.outputs; column += 2 * panel_columns) {
    const int next = column + 2 * panel_columns;
    const Ahead ahead = ahead_at<Product>(layer, next < layer.outputs ? next : 0, 0);
    if (column + panel_columns < layer.outputs)
      tiled.template multiply_columns<2>(rows, column, ahead);
    else
      tiled.template multiply_columns<1>(rows, column, ahead);
  }
  finish_layer(layer, rows, out, block_stride);
}

}  // namespace mprec::MPREC_ISA
#endif
