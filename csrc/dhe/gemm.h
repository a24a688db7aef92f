// The decoder's matrix product: rows of inputs (blocks of constant pitch, dhe.h) times packed weights.
//
// One tile of the output stays in registers over a block of inputs. A step over `group` inputs loads the
// weights of the tile's columns and one word for each row, and does rows x vectors multiply-adds. Two of them
// start per cycle and take 4 cycles, so at least 8 must be in flight, and at most two loads fit beside them:
//   AVX-512, 32 registers: 14 rows x 2 vectors = 28 accumulators; 16 loads for 28 FMAs
//   AVX2, 16 registers:     6 rows x 2 vectors = 12 accumulators;  8 loads for 12 FMAs
// A row's word is broadcast to a register once: as a memory operand of each FMA it would be loaded twice,
// which costs Granite Rapids 10 to 15 %. The same tile in the L1 cache reaches 96 % of the FMA peak there.
// Tiles of few rows have too few accumulators to hide the latency, and split the inputs over several sets.
//
// What is multiplied is a `Product`: the types of inputs and weights, where they lie, and the instruction.
// Weights that take more than a load to become float32 are converted once for all tiles of a block of rows,
// into a panel that stays in the L1 cache (`unpack`). A single tile of float16 converts as it goes: two
// instructions on the multiply-adds' ports for each vector, a seventh more with 14 rows.
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

template <int n>
struct Constant {  // a number that a template can take from an argument
  constexpr operator int() const { return n; }
};

// Sets of `size` accumulators: as many as leave registers for the rest.
constexpr int accumulator_sets(int size) {
  int sets = 1;
  while (2 * sets * size <= tile_rows * tile_vectors) sets *= 2;
  return sets;
}

#if defined(__AVX512F__)
inline Vec load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
#elif defined(__AVX2__)
inline Vec load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
#else
inline Vec load_half(const uint16_t* p) {
  _Float16 half;
  __builtin_memcpy(&half, p, sizeof half);
  return {static_cast<float>(half)};
}
#endif

// fma(a, b, sum), in the register of `sum`: left to choose, gcc 12 moves a tile's accumulators about, and
// spills some.
#if defined(__AVX2__)
inline Vec accumulate(Vec a, Vec b, Vec sum) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}
#else
inline Vec accumulate(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
#endif

constexpr int never = 1 << 30;

template <class W>  // float, or uint16_t for float16
struct FloatProduct {
  using Input = float;
  using Weight = W;
  using Sum = Vec;
  static constexpr int group = 1;              // inputs that one step takes
  static constexpr int block = block_columns;  // inputs of a block
  static constexpr int row_pitch = block_pitch,
                       step_pitch = 1;                // of the inputs, from row to row, step to step
  static constexpr int weight_pitch = panel_columns;  // of the weights, from step to step
  static Vec zero() { return MPREC_ISA::zero(); }
  static Vec broadcast_input(const float* p) { return broadcast(*p); }
  static Vec load_weights(const float* p) { return load(p); }
  static Vec load_weights(const uint16_t* p) { return load_half(p); }
  static Vec multiply_add(Vec a, Vec w, Vec sum) { return accumulate(a, w, sum); }
  static Vec add(Vec a, Vec b) { return a + b; }
  // A sum goes on from what the output had before.
  static Vec start(Vec before) { return before; }
  static Vec finish(Vec sum, Vec, const float*) { return sum; }
  // Inputs of a block as the product takes them: as they are.
  static const float* prepare(float* block, int, int) { return block; }
  // As many rows of weights that are no float32 are worth unpacking them.
  static constexpr int unpack_rows = sizeof(W) == sizeof(float) ? never : 2 * tile_rows;
  // `vectors` vectors of columns of so many inputs, to [input][panel_columns].
  static void unpack(const W* weights, int inputs, int vectors, float* out) {
    for (int k = 0; k < inputs; ++k, weights += panel_columns, out += panel_columns)
      for (int v = 0; v < vectors; ++v) store(out + v * Vec::width, load_weights(weights + v * Vec::width));
  }
};

template <class Product>
struct TileArguments {
  const typename Product::Input* in;        // the tile's first row, first input of the block
  const typename Product::Weight* weights;  // the first panel's weights for that input
  int64_t panel_stride;                     // from panel to panel of weights
  int steps;
  const float* scale;  // of the tile's columns, for a Product that has scales
  float* out;          // the tile's first row and column
  int64_t out_pitch;
  const float* bias;  // of the tile's columns, for the first block of inputs; null: add what `out` holds
  bool relu;          // after the last block
};

template <class Product, int rows, int vectors>
void tile(const TileArguments<Product>& t) {
  constexpr int sets = accumulator_sets(rows * vectors);
  constexpr int steps_at_once = sets > 4 ? sets : 4;  // fewer counters and branches between multiply-adds
  constexpr int per_panel = panel_columns / Vec::width;
  using Sum = typename Product::Sum;
  float* const out = t.out;
  const float *const bias = t.bias, *const scale = t.scale;
  const int64_t out_pitch = t.out_pitch;
  const auto before = [&](int r, int v) {
    return load((bias ? bias : out + r * out_pitch) + v * Vec::width);
  };
  Sum sum[sets][rows][vectors];
#pragma GCC unroll 8
  for (int s = 0; s < sets; ++s)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        sum[s][r][v] = s == 0 ? Product::start(before(r, v)) : Product::zero();

  const typename Product::Input* in = t.in;
  const typename Product::Weight* weights = t.weights;
  const auto step = [&](Sum(&to)[rows][vectors]) __attribute__((always_inline)) {
    Sum w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      w[v] = Product::load_weights(weights + v / per_panel * t.panel_stride +
                                   v % per_panel * Vec::width * Product::group);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Sum a = Product::broadcast_input(in + r * Product::row_pitch);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) to[r][v] = Product::multiply_add(a, w[v], to[r][v]);
    }
    in += Product::step_pitch;
    weights += Product::weight_pitch;
  };
  int k = 0;
  for (; k + steps_at_once <= t.steps; k += steps_at_once)
#pragma GCC unroll 32
    for (int s = 0; s < steps_at_once; ++s) step(sum[s % sets]);
  for (; k < t.steps; ++k) step(sum[0]);

  const auto finish = [&](bool relu_too) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        Sum total = sum[0][r][v];
#pragma GCC unroll 8
        for (int s = 1; s < sets; ++s) total = Product::add(total, sum[s][r][v]);
        const Vec y = Product::finish(total, before(r, v), scale + v * Vec::width);
        store(out + r * out_pitch + v * Vec::width, relu_too ? relu(y) : y);
      }
  };
  if (t.relu)
    finish(true);
  else
    finish(false);
}

template <class Product, int rows, int vectors>
inline void run_tile(int wanted_rows, const TileArguments<Product>& t) {
  if (wanted_rows == rows)
    tile<Product, rows, vectors>(t);
  else if constexpr (rows > 1)
    run_tile<Product, rows - 1, vectors>(wanted_rows, t);
}

// Tiles of nearly equal height over `rows` rows, for the columns at which `t` stands.
template <class Product, int vectors>
inline void run_tiles(int rows, int64_t row_pitch, TileArguments<Product> t) {
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  const auto* const in = t.in;
  float* const out = t.out;
  for (int i = 0; i < tiles; ++i) {
    const int begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    t.in = in + begin * row_pitch;
    t.out = out + begin * t.out_pitch;
    run_tile<Product, tile_rows, vectors>(end - begin, t);
  }
}

// As run_tiles, with the weights of `t` converted to float32 first: to [step][panel_columns].
template <class Product, int vectors>
inline void run_unpacked(int rows, const TileArguments<Product>& t) {
  constexpr int in_panel = vectors * Vec::width < panel_columns ? vectors : panel_columns / Vec::width;
  constexpr int panels = vectors / in_panel;
  alignas(64) float unpacked[panels * block_columns * panel_columns];
  TileArguments<FloatProduct<float>> u{};
  u.in = t.in;
  u.weights = unpacked;
  u.steps = t.steps * Product::group;
  u.panel_stride = int64_t{u.steps} * panel_columns;
  u.out = t.out;
  u.out_pitch = t.out_pitch;
  u.bias = t.bias;
  u.relu = t.relu;
  for (int p = 0; p < panels; ++p)
    Product::unpack(t.weights + p * t.panel_stride, t.steps, in_panel, unpacked + p * u.panel_stride);
  run_tiles<FloatProduct<float>, vectors>(rows, FloatProduct<float>::row_pitch, u);
}

constexpr int tile_columns = tile_vectors * Vec::width;

// Inputs `in` [rows x inputs] of one block times the layer's weights from `first_input` on, into a tile's
// columns from `column` on of the blocks at `out`. Sums start from the bias; ReLU follows the last inputs.
template <class Product>
inline void multiply_columns(const LayerView& layer, int first_input, int inputs,
                             const typename Product::Input* in, int rows, int column, float* out,
                             int64_t block_stride) {
  const bool last = first_input + inputs == layer.inputs;
  constexpr int group = Product::group;
  TileArguments<Product> t;
  t.in = in;
  t.steps = (inputs + group - 1) / group;
  t.panel_stride = int64_t{(layer.inputs + group - 1) / group} * group * panel_columns;
  t.out_pitch = block_pitch;
  t.relu = last && layer.activation == Activation::relu;
  const auto run = [&](auto vectors) {
    if constexpr (Product::unpack_rows < never)
      if (rows >= Product::unpack_rows) return run_unpacked<Product, vectors>(rows, t);
    if constexpr (Product::unpack_rows > 0) run_tiles<Product, vectors>(rows, Product::row_pitch, t);
  };
  const auto* weights = static_cast<const typename Product::Weight*>(layer.weights);
  t.weights = weights + column / panel_columns * t.panel_stride + int64_t{first_input} * panel_columns +
              column % panel_columns * group;
  t.scale = layer.scale + column;
  t.bias = first_input == 0 ? layer.bias + column : nullptr;
  t.out = out + column / block_columns * block_stride + column % block_columns;
  if (tile_columns > panel_columns && column + panel_columns >= layer.outputs)
    run(Constant<panel_columns / Vec::width>{});
  else
    run(Constant<tile_vectors>{});
}

// The activation that tiles leave to be done.
inline void finish_layer(const LayerView& layer, int rows, float* out, int64_t block_stride) {
  if (layer.activation != Activation::relu) activate_layer(layer, rows, out, block_stride);
}

// As multiply_columns, for all columns, and with the activation.
template <class Product>
inline void multiply_block(const LayerView& layer, int first_input, int inputs,
                           const typename Product::Input* in, int rows, float* out, int64_t block_stride) {
  for (int column = 0; column < layer.outputs; column += tile_columns)
    multiply_columns<Product>(layer, first_input, inputs, in, rows, column, out, block_stride);
  if (first_input + inputs == layer.inputs) finish_layer(layer, rows, out, block_stride);
}

// Rows so few that their time is that of reading the weights.
constexpr int few_rows = 4;

// A whole layer for few rows; its blocks of inputs lie `in_rows` rows apart. Reads each column's weights to
// the end before the next, and the columns from the last to the first if `backwards`: a call in one direction
// after a call in the other finds in the cache what that has read last, even of weights that do not fit.
template <class Product>
inline void multiply_few(const LayerView& layer, const typename Product::Input* in, int in_rows, int rows,
                         bool backwards, float* out, int64_t block_stride) {
  const int tiles = (layer.outputs + tile_columns - 1) / tile_columns;
  for (int i = 0; i < tiles; ++i) {
    const int column = (backwards ? tiles - 1 - i : i) * tile_columns;
    for (int k0 = 0; k0 < layer.inputs; k0 += Product::block)
      multiply_columns<Product>(
          layer, k0, layer.inputs - k0 < Product::block ? layer.inputs - k0 : Product::block,
          in + int64_t{k0} / Product::block * in_rows * Product::row_pitch, rows, column, out, block_stride);
  }
  finish_layer(layer, rows, out, block_stride);
}

// A whole layer, from blocks of activations to blocks of activations.
template <class Product>
inline void next_layer(const LayerView& layer, int n, bool backwards, float* in, float* out,
                       int64_t block_stride) {
  const typename Product::Input* first = nullptr;
  for (int k0 = 0; k0 < layer.inputs; k0 += block_columns) {
    const int count = layer.inputs - k0 < block_columns ? layer.inputs - k0 : block_columns;
    const auto* block = Product::prepare(in + k0 / block_columns * block_stride, n, count);
    if (k0 == 0) first = block;
    if (n > few_rows) multiply_block<Product>(layer, k0, count, block, n, out, block_stride);
  }
  if (n <= few_rows)
    multiply_few<Product>(layer, first, static_cast<int>(block_stride / block_pitch), n, backwards, out,
                          block_stride);
}

}  // namespace mprec::MPREC_ISA
