// Dot products of all pairs of a sample's vectors: the lower triangle of V V^T, and nothing else.
//
// A sample's vectors are transposed once, to [dim][vectors]: then a step over `dim` loads a register of
// columns and one word for each row from one line, at constant offsets, and adds rows x registers products.
// Rows come in groups of 8 (AVX2: 4), of which each group takes only the registers that its longest row
// needs: of 27 vectors 576 products of registers, where the whole square has 864 and the triangle 351.
#pragma once
#include "dense/dense.h"
#include "dhe/gemm.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

// [rows][columns], `stride` floats apart, to [columns][pitch] with zeros past the rows.
inline void transpose(const float* from, int64_t stride, int rows, int columns, float* to, int64_t pitch) {
  constexpr int width = Vec::width;
  for (int i = 0; i < pitch; i += width)
    for (int j = 0; j < columns; j += width)
      transpose_tile(from + i * stride + j, stride, rows - i, columns - j < width ? columns - j : width,
                     to + j * pitch + i, pitch);
}

// The first n <= width lanes, into columns of a sample's blocks. Across a block's end both parts are stored
// whole: past the block lies padding, and before the next one that of the sample before.
inline void store_columns(float* sample, int64_t block_stride, int64_t column, Vec x, int n) {
  const int64_t offset = column % block_columns;
  float* const block = sample + column / block_columns * block_stride;
  const Mask mask(n);
  store(block + offset, x, mask);
  if (offset + n > block_columns) store(block + block_stride + offset - block_columns, x, mask);
}

// Where a sample's products go: product (i, j) to column first + (row i's start) + j.
struct Triangle {
  float* sample;
  int64_t block_stride, first_column;
  bool self;
  int64_t row_begin(int64_t i) const { return first_column + i * (i - 1) / 2 + (self ? i : 0); }
  int row_length(int i) const { return i + self; }
};

// Products of vectors `row` ... `row + rows - 1` with those from `column` on.
template <int rows, int vectors>
void products(const float* transposed, int64_t pitch, int dim, int row, int column, const Triangle& out) {
  Vec sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = zero();
  const float *a = transposed + row, *b = transposed + column;
  for (int k = 0; k < dim; ++k, a += pitch, b += pitch) {
    Vec x[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) x[v] = load(b + v * Vec::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec y = broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = accumulate(y, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int left = out.row_length(row + r) - column - v * Vec::width;
      if (left > 0)
        store_columns(out.sample, out.block_stride, out.row_begin(row + r) + column + v * Vec::width,
                      sum[r][v], left < Vec::width ? left : Vec::width);
    }
}

template <int rows, int vectors>
inline void some_products(int wanted_rows, int wanted_vectors, const float* transposed, int64_t pitch,
                          int dim, int row, int column, const Triangle& out) {
  if constexpr (vectors > 1)
    if (wanted_vectors < vectors)
      return some_products<rows, vectors - 1>(wanted_rows, wanted_vectors, transposed, pitch, dim, row,
                                              column, out);
  if constexpr (rows > 1)
    if (wanted_rows < rows)
      return some_products<rows - 1, vectors>(wanted_rows, wanted_vectors, transposed, pitch, dim, row,
                                              column, out);
  products<rows, vectors>(transposed, pitch, dim, row, column, out);
}

static inline void interact(const InteractionView& view, const float* vectors, int64_t stride, int samples,
                            float* transposed, float* blocks, int64_t block_stride, int first_column) {
  const int n = view.vectors, first_row = view.self ? 0 : 1;
  const int64_t pitch = (n + 15) / 16 * 16;
  for (int s = 0; s < samples; ++s) {
    transpose(vectors + s * stride, view.dim, n, view.dim, transposed, pitch);
    const Triangle out{blocks + s * block_pitch, block_stride, first_column, view.self};
    for (int row = first_row; row < n; row += group_rows) {
      const int rows = n - row < group_rows ? n - row : group_rows;
      const int columns = out.row_length(row + rows - 1);
      for (int column = 0; column < columns; column += group_vectors * Vec::width) {
        const int left = (columns - column + Vec::width - 1) / Vec::width;
        some_products<group_rows, group_vectors>(rows, left < group_vectors ? left : group_vectors,
                                                 transposed, pitch, view.dim, row, column, out);
      }
    }
  }
}

// out[row + r][column ...] = sum over j of weights[j][row + r] vectors[j][column ...], of symmetric weights.
template <int rows>
void weighted_sums(const float* weights, int64_t pitch, const Vectors& vectors, int n, int dim, int row,
                   int column, const VectorsOf<float>& out) {
  const Mask mask(dim - column < Vec::width ? dim - column : Vec::width);
  Vec sum[rows];
  const float *w = weights + row, *v = vectors.others + column;
  Vec x = load(vectors.first + column, mask);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sum[r] = broadcast(w[r]) * x;
  for (int j = 1; j < n; ++j, v += dim) {
    w += pitch;
    x = load(v, mask);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = accumulate(broadcast(w[r]), x, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    float* const to = row + r == 0 ? out.first : out.others + (row + r - 1) * int64_t{dim};
    store(to + column, sum[r], mask);
  }
}

template <int rows>
inline void some_sums(int wanted, const float* weights, int64_t pitch, const Vectors& vectors, int n, int dim,
                      int row, int column, const VectorsOf<float>& out) {
  if constexpr (rows > 1)
    if (wanted < rows) return some_sums<rows - 1>(wanted, weights, pitch, vectors, n, dim, row, column, out);
  weighted_sums<rows>(weights, pitch, vectors, n, dim, row, column, out);
}

// G + G^T of a sample's triangle of gradients G, [n][pitch]: rows are copied with zeros behind them, and
// tiles of the whole are transposed. On the diagonal of `self` stands twice the gradient, as it should.
inline void symmetric_gradient(const InteractionView& view, const float* grad, float* lower, float* out,
                               int64_t pitch) {
  const int n = view.vectors;
  for (int i = 0; i < n; ++i) {
    const int length = i + view.self;
    for (int c = 0; c < pitch; c += Vec::width) {
      const int left = length - c < 0 ? 0 : length - c < Vec::width ? length - c : Vec::width;
      store(lower + i * pitch + c, left == 0 ? zero() : load(grad + c, Mask(left)));
    }
    grad += length;
  }
  transpose(lower, pitch, n, static_cast<int>(pitch), out, pitch);
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < pitch; c += Vec::width) {
      float* const to = out + i * pitch + c;
      store(to, load(to) + load(lower + i * pitch + c));
    }
}

// Product (i, j) passes its gradient, times one vector, on to the other: (G + G^T) V with G the triangle.
static inline void interact_backward(const InteractionView& view, const Vectors& vectors, const float* grad,
                                     float* scratch, const VectorsOf<float>& out) {
  const int n = view.vectors, dim = view.dim;
  const int64_t pitch = (n + 15) / 16 * 16;
  float* const symmetric = scratch + pitch * pitch;
  symmetric_gradient(view, grad, scratch, symmetric, pitch);
  for (int column = 0; column < dim; column += Vec::width)
    for (int row = 0; row < n; row += group_rows)
      some_sums<group_rows>(n - row < group_rows ? n - row : group_rows, symmetric, pitch, vectors, n, dim,
                            row, column, out);
}

}  // namespace mprec::MPREC_ISA
