// Gradients of embedding tables, row by row, and optimizers applied in the same pass. README.md has the
// formulas.
#pragma once
#include <cstdint>

#include "bags/bags.h"
#include "rows/formats.h"

namespace mprec {

// What becomes of a row's gradient g. `first` and `second` are the optimizer's state of that row.
enum class Rule {
  assign,           // row = g
  sgd,              // row -= lr g
  adagrad,          // first += g^2;         row -= lr g / (sqrt(first) + eps)
  rowwise_adagrad,  // first += mean(g^2);   row -= lr g / (sqrt(first) + eps), one `first` a row
  adam,             // first, second: moments of g and g^2; row -= lr first / (sqrt(second) + eps)
};

struct Update {
  Rule rule;
  float lr, eps;       // adam: lr with both bias corrections in it
  float beta1, beta2;  // adam
  float keep = 1.0f;   // decay: the row is multiplied by it before the step; not for assign
};

// The rows that an update writes. `first` and `second` may be null if the rule has no such state.
struct TableRows {
  void* weight;  // numbers of `format`: f32, f16 or bf16 (assign: f32 only)
  float *first, *second;
  int64_t weight_stride, state_stride;  // numbers from one row to the next
  Format format = Format::f32;
  // How 16-bit rows are rounded: stochastically (rows/rounding.h) by noise of this key, or to nearest.
  bool stochastic = false;
  uint64_t noise = 0;
};

// A share of one table's gradient, sorted: entry e adds scales[e] times the gradient of bag bags[e].
struct RowGradients {
  const uint64_t* keys;  // row << 32 | entry, ascending: so a row's entries are added in the indices' order
  int64_t count;
  const int32_t* bags;
  const float* scales;  // null: all 1
  const void* grad;     // bag b's gradient: grad + b * grad_stride, dim numbers
  int64_t grad_stride, dim;
  bool narrow = false;  // numbers of the table's 16 bits; else float32
};

// The gradient of what a table's bags were pooled to: of the feature's bag b, dim numbers at
// grad + b * grad_stride.
struct PooledGradient {
  const void* grad;
  int64_t grad_stride, dim;
  int64_t num_rows;     // of the table
  bool narrow = false;  // as in RowGradients
};

// Applies `update` to the rows of every table that its feature's bags use: gradients[f] is that of feature f
// and tables[f] is written. Modes sum and mean.
// A row's gradient is summed in the order of the indices and each row is handled by one thread: the result
// does not depend on the number of threads. Nothing is written if the indices or offsets are invalid
// (IdError, OffsetsError).
void update_tables(const Bags&, const PooledGradient* gradients, const TableRows* tables, const Update&,
                   int threads);

// The coalesced sparse gradient of the one table of the bags: its distinct rows, ascending, to `rows` and
// their gradients to `values` [count, dim]; both have room for as many rows as there are indices. Returns
// their count.
int64_t sparse_gradient(const Bags&, const PooledGradient&, int64_t* rows, float* values, int threads);

struct GradientKernels {
  // Applies the update, in float32, to each distinct row of the share. `compact`: the i-th distinct row of
  // the share is written at weight + i * weight_stride, not at its own place (assign only). `scratch`: dim
  // floats.
  void (*apply)(const RowGradients&, const TableRows&, const Update&, bool compact, float* scratch);
  // Adds each entry's term to sums[row * dim], in the order of the keys, which need not be sorted. `narrow`
  // gradients are numbers of `format`.
  void (*add)(const RowGradients&, Format format, float* sums);
};

}  // namespace mprec
