// The decoder's matrix product: rows of activations (blocks of constant pitch, dhe.h) times packed weights.
//
// One tile of the output stays in registers over a block of inputs. A step over one input loads the weights
// of the tile's columns and one number for each row, and does rows x vectors FMAs. Two FMAs start per cycle
// and take 4 cycles, so at least 8 must be in flight, and at most two loads fit beside them:
//   AVX-512, 32 registers: 14 rows x 2 vectors = 28 accumulators; 16 loads for 28 FMAs
//   AVX2, 16 registers:     6 rows x 2 vectors = 12 accumulators;  8 loads for 12 FMAs
// Tiles of fewer rows have too few accumulators to hide the latency, and split the inputs over several sets.
#pragma once
#include "common/vec.h"
#include "dhe/dhe.h"
#include "dhe/math.h"

namespace mprec::MPREC_ISA {

#if defined(__AVX512F__)
constexpr int tile_rows = 14, tile_vectors = 2;
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_vectors = 2;
#else
constexpr int tile_rows = 4, tile_vectors = 4;
#endif

struct TileArguments {
  const float* in;       // tile's first row, first input of the block
  const float* weights;  // the first panel's row for that input
  int64_t panel_stride;  // from panel to panel
  int inputs;            // of this block
  float* out;            // tile's first row and column
  bool accumulate;       // add what `out` holds
  const float* bias;     // null: not the last block of inputs
  bool relu;
};

// Vector v of the tile's columns is in panel v * width / 16.
inline Vec load_weights(const float* weights, int64_t panel_stride, int v) {
  constexpr int per_panel = panel_columns / Vec::width;
  return load(weights + v / per_panel * panel_stride + v % per_panel * Vec::width);
}

template <int rows, int vectors>
void tile(const TileArguments& t) {
  // Enough sets of accumulators for 8 FMAs in flight.
  constexpr int sets = rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : rows * vectors >= 2 ? 4 : 8;
  Vec sum[sets][rows][vectors];
#pragma GCC unroll 8
  for (int s = 0; s < sets; ++s)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[s][r][v] = zero();

  const auto step = [&](const float* in, const float* weights, Vec(&to)[rows][vectors]) {
    Vec w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = load_weights(weights, t.panel_stride, v);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec a = broadcast(in[r * block_pitch]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) to[r][v] = fma(a, w[v], to[r][v]);
    }
  };
  const float *in = t.in, *weights = t.weights;
  int k = 0;
  for (; k + sets <= t.inputs; k += sets) {
#pragma GCC unroll 8
    for (int s = 0; s < sets; ++s) step(in + s, weights + s * panel_columns, sum[s]);
    in += sets;
    weights += sets * panel_columns;
  }
  if constexpr (sets > 1)
    for (; k < t.inputs; ++k, ++in, weights += panel_columns) step(in, weights, sum[0]);

#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Vec y = sum[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < sets; ++s) y = y + sum[s][r][v];
      float* out = t.out + r * block_pitch + v * Vec::width;
      if (t.accumulate) y = y + load(out);
      if (t.bias) y = y + load(t.bias + v * Vec::width);
      if (t.relu) y = greater(zero(), y);  // NaN passes
      store(out, y);
    }
}

template <int rows, int vectors>
inline void run_tile(int wanted_rows, const TileArguments& t) {
  if (wanted_rows == rows)
    tile<rows, vectors>(t);
  else if constexpr (rows > 1)
    run_tile<rows - 1, vectors>(wanted_rows, t);
}

// Rows `in` [rows x inputs] of one block times the weights of layer inputs [first_input, + inputs), into the
// blocks at `out`; bias and activation follow the last inputs.
inline void multiply_block(const LayerView& layer, int first_input, int inputs, const float* in, int rows,
                           float* out, int64_t block_stride) {
  const bool last = first_input + inputs == layer.inputs;
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  TileArguments t;
  t.panel_stride = int64_t{layer.inputs} * panel_columns;
  t.inputs = inputs;
  t.accumulate = first_input > 0;
  t.relu = last && layer.activation == Activation::relu;
  constexpr int step = tile_vectors * Vec::width;
  for (int column = 0; column < layer.outputs; column += step) {
    t.weights = layer.weights + column / panel_columns * t.panel_stride +
                int64_t{first_input} * panel_columns + column % panel_columns;
    t.bias = last ? layer.bias + column : nullptr;
    float* to = out + column / block_columns * block_stride + column % block_columns;
    const bool narrow = step > panel_columns && column + panel_columns >= layer.outputs;
    for (int i = 0; i < tiles; ++i) {
      const int begin = rows * i / tiles, end = rows * (i + 1) / tiles;
      t.in = in + begin * block_pitch;
      t.out = to + begin * block_pitch;
      if (narrow)
        run_tile<tile_rows, panel_columns / Vec::width>(end - begin, t);
      else
        run_tile<tile_rows, tile_vectors>(end - begin, t);
    }
  }
  if (!last) return;
  for (int column = 0; column < layer.outputs; column += block_columns) {
    const int count = layer.outputs - column < block_columns ? layer.outputs - column : block_columns;
    for (int r = 0; r < rows; ++r)
      activate(layer.activation, out + column / block_columns * block_stride + r * block_pitch, count);
  }
}

}  // namespace mprec::MPREC_ISA
