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
// A network's weights often do not stay in the L2 cache from one block of rows to the next. The first tile of
// some columns would wait for theirs, and the processor's own prefetchers stop at each page: so tiles fetch
// the lines that come next, those of the next columns, while they multiply.
//
// What is multiplied is a `Product`: the types of inputs and weights, where they lie, and the instruction.
// Weights that take more than a load to become float32 are converted once for all tiles of a block of rows,
// into a panel that stays in the L1 cache (`unpack`). A single tile of float16 converts as it goes: two
// instructions on the multiply-adds' ports for each vector, a seventh more with 14 rows.
#pragma once
#include "dhe/dhe.h"
#include "dhe/math.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

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

constexpr int never = 1 << 30;

template <class W>  // float, or uint16_t for float16
struct FloatProduct {
  using Input = float;
  using Weight = W;
  using Sum = Vec;
  static constexpr int group = 1;              // inputs that one step takes
  static constexpr int pad = 1;                // the inputs of a panel are a multiple of it
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
  template <class Columns>
  static Vec finish(const Columns&, Vec sum, Vec, int, int) {
    return sum;
  }
  static constexpr bool prepares_rows = false;  // but blocks, each by itself:
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

// Weights that are read next: at `weights` of a panel, and of the panel `panel_stride` bytes behind.
struct Ahead {
  const char* weights = nullptr;  // null: none
  int64_t panel_stride = 0;
};

template <class Product>
struct TileArguments {
  const typename Product::Input* in;        // the tile's first row, first input of the block
  const typename Product::Weight* weights;  // the first panel's weights for that input
  int64_t panel_stride;                     // from panel to panel of weights
  int steps;
  const float *scale, *shift;  // of the tile's columns, for a Product that has them
  float* out;                  // the tile's first row and column
  int64_t out_pitch;
  const float* bias;  // of the tile's columns, for the first block of inputs; null: add what `out` holds
  bool relu;          // after the last block
  Ahead ahead;
};

// Rows so few that their time is that of reading the weights.
constexpr int few_rows = 4;
// What a Product finishes sums with: scales and shifts of the tile's columns, its inputs' first row.
template <class Input>
struct TileColumns {
  const float *scale, *shift;
  const Input* in;
  bool first;  // block of inputs
};

// Lines of each panel that a tile fetches for each four of its steps: two tiles fetch what all will need.
constexpr int lines_ahead = 2;

template <class Product, int rows, int vectors>
void tile(const TileArguments<Product>& t) {
  constexpr int sets = accumulator_sets(rows * vectors);
  constexpr int steps_at_once = sets > 4 ? sets : 4;  // fewer counters and branches between multiply-adds
  constexpr int per_panel = panel_columns / Vec::width, panels = (vectors + per_panel - 1) / per_panel;
  using Sum = typename Product::Sum;
  float* const out = t.out;
  const float* const bias = t.bias;
  const TileColumns<typename Product::Input> columns{t.scale, t.shift, t.in, t.bias != nullptr};
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
  constexpr bool fetches = rows > few_rows;  // the whole time of fewer is that of reading
  const char* ahead = t.ahead.weights;
  const int64_t ahead_stride = t.ahead.panel_stride;
  int k = 0;
  for (; k + steps_at_once <= t.steps; k += steps_at_once) {
#pragma GCC unroll 32
    for (int s = 0; s < steps_at_once; ++s) {
      if (fetches && s % 4 == 0) {
#pragma GCC unroll 8
        for (int line = 0; line < lines_ahead; ++line)
#pragma GCC unroll 8
          for (int p = 0; p < panels; ++p) prefetch_l2(ahead + p * ahead_stride + line * 64);
        ahead += 64 * lines_ahead;
      }
      step(sum[s % sets]);
    }
  }
  for (; k < t.steps; ++k) step(sum[0]);

  const auto finish = [&](bool relu_too) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        Sum total = sum[0][r][v];
#pragma GCC unroll 8
        for (int s = 1; s < sets; ++s) total = Product::add(total, sum[s][r][v]);
        const Vec y = Product::finish(columns, total, before(r, v), r, v);
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
  const Ahead ahead = t.ahead;
  for (int i = 0; i < tiles; ++i) {
    const int begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    const int64_t fetched = int64_t{i} * (t.steps / 4) * 64 * lines_ahead;
    t.ahead =
        ahead.weights && fetched < int64_t{t.steps} * Product::weight_pitch * int64_t{sizeof(*t.weights)}
            ? Ahead{ahead.weights + fetched, ahead.panel_stride}
            : Ahead{reinterpret_cast<const char*>(t.weights), 0};
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

// From panel to panel of a layer's weights.
template <class Product>
inline int64_t panel_stride(const LayerView& layer) {
  return int64_t{(layer.inputs + Product::pad - 1) / Product::pad} * Product::pad * panel_columns;
}

// Where the weights of a column and an input lie; both are the first of a tile.
template <class Product>
inline const typename Product::Weight* weights_at(const LayerView& layer, int column, int input) {
  return static_cast<const typename Product::Weight*>(layer.weights) +
         column / panel_columns * panel_stride<Product>(layer) + int64_t{input} * panel_columns +
         column % panel_columns * Product::group;
}

// A layer's weights of such a column and input, as they are read ahead.
template <class Product>
inline Ahead ahead_at(const LayerView& layer, int column, int input) {
  return {reinterpret_cast<const char*>(weights_at<Product>(layer, column, input)),
          panel_stride<Product>(layer) * int64_t{sizeof(typename Product::Weight)}};
}

// Inputs `in` [rows x inputs] of one block times the layer's weights from `first_input` on, into a tile's
// columns from `column` on of the blocks at `out`. Sums start from the bias; ReLU follows the last inputs.
template <class Product>
inline void multiply_columns(const LayerView& layer, int first_input, int inputs,
                             const typename Product::Input* in, int rows, int column, float* out,
                             int64_t block_stride, Ahead ahead) {
  const bool last = first_input + inputs == layer.inputs;
  constexpr int group = Product::group;
  TileArguments<Product> t;
  t.in = in;
  t.steps = (inputs + group - 1) / group;
  t.panel_stride = panel_stride<Product>(layer);
  t.ahead = ahead;
  t.out_pitch = block_pitch;
  t.relu = last && layer.activation == Activation::relu;
  const auto run = [&](auto vectors) {
    if constexpr (Product::unpack_rows < never)
      if (rows >= Product::unpack_rows) return run_unpacked<Product, vectors>(rows, t);
    if constexpr (Product::unpack_rows > 0) run_tiles<Product, vectors>(rows, Product::row_pitch, t);
  };
  t.weights = weights_at<Product>(layer, column, first_input);
  t.scale = layer.scale + column;
  t.shift = layer.shift ? layer.shift + column : nullptr;
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

// As multiply_columns, for all columns, and with the activation. `next`: the layer after this one, if its
// weights are to be fetched.
template <class Product>
inline void multiply_block(const LayerView& layer, int first_input, int inputs,
                           const typename Product::Input* in, int rows, float* out, int64_t block_stride,
                           const LayerView* next = nullptr) {
  const bool last = first_input + inputs == layer.inputs;
  for (int column = 0; column < layer.outputs; column += tile_columns) {
    const Ahead ahead = column + tile_columns < layer.outputs
                            ? ahead_at<Product>(layer, column + tile_columns, first_input)
                        : !last ? ahead_at<Product>(layer, 0, first_input + inputs)
                        : next  ? ahead_at<Product>(*next, 0, 0)
                                : Ahead{};
    multiply_columns<Product>(layer, first_input, inputs, in, rows, column, out, block_stride, ahead);
  }
  if (last) finish_layer(layer, rows, out, block_stride);
}

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
      multiply_columns<Product>(layer, k0,
                                layer.inputs - k0 < Product::block ? layer.inputs - k0 : Product::block,
                                in + int64_t{k0} / Product::block * in_rows * Product::row_pitch, rows,
                                column, out, block_stride, Ahead{});
  }
  finish_layer(layer, rows, out, block_stride);
}

// A layer's inputs as the product takes them.
template <class Product>
inline void prepare_layer(float* in, int rows, int inputs, int64_t block_stride) {
  if constexpr (Product::prepares_rows)
    Product::prepare(in, rows, inputs, block_stride);
  else
    for (int k0 = 0; k0 < inputs; k0 += block_columns)
      Product::prepare(in + k0 / block_columns * block_stride, rows,
                       inputs - k0 < block_columns ? inputs - k0 : block_columns);
}

// A whole layer, from blocks of activations to blocks of activations; `next` as for multiply_block.
template <class Product>
inline void next_layer(const LayerView& layer, int n, bool backwards, float* in, float* out,
                       int64_t block_stride, const LayerView* next = nullptr) {
  using Input = typename Product::Input;
  prepare_layer<Product>(in, n, layer.inputs, block_stride);
  if (n <= few_rows) {
    const int rows = static_cast<int>(block_stride / block_pitch) * (Product::block / block_columns);
    return multiply_few<Product>(layer, reinterpret_cast<const Input*>(in), rows, n, backwards, out,
                                 block_stride);
  }
  for (int k0 = 0; k0 < layer.inputs; k0 += Product::block)
    multiply_block<Product>(
        layer, k0, layer.inputs - k0 < Product::block ? layer.inputs - k0 : Product::block,
        reinterpret_cast<const Input*>(in + k0 / block_columns * block_stride), n, out, block_stride, next);
}

}  // namespace mprec::MPREC_ISA
