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

// out[i][column ...] of `rows` vectors i from `row` on: the sum over j < i of grad[i][j] vectors[j] and over
// j > i of grad[j][i] vectors[j]; with `self` also twice grad[i][i] vectors[i].
template <int rows>
void weighted_sums(const float* grad, bool self, const Vectors& vectors, int n, int dim, int row, int column,
                   const VectorsOf<float>& out) {
  const Mask mask(dim - column < Vec::width ? dim - column : Vec::width);
  const auto line = [&](int64_t i) { return grad + i * (i - 1) / 2 + (self ? i : 0); };
  const auto vector = [&](int64_t j) {
    return load((j == 0 ? vectors.first : vectors.others + (j - 1) * dim) + column, mask);
  };
  Vec sum[rows];
  const float* of[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    sum[r] = zero();
    of[r] = line(row + r);
  }
  for (int j = 0; j < row; ++j) {
    const Vec x = vector(j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = accumulate(broadcast(of[r][j]), x, sum[r]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < rows; ++j) {
    const Vec x = vector(row + j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
      if (r != j)
        sum[r] = accumulate(broadcast(r > j ? of[r][row + j] : of[j][row + r]), x, sum[r]);
      else if (self)
        sum[r] = accumulate(broadcast(2 * of[r][row + r]), x, sum[r]);
  }
  const float* below = line(row + rows) + row;
  for (int j = row + rows; j < n; below += j + self, ++j) {
    const Vec x = vector(j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = accumulate(broadcast(below[r]), x, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    float* const to = row + r == 0 ? out.first : out.others + (row + r - 1) * int64_t{dim};
    store(to + column, sum[r], mask);
  }
}

template <int rows>
inline void some_sums(int wanted, const float* grad, bool self, const Vectors& vectors, int n, int dim,
                      int row, int column, const VectorsOf<float>& out) {
  if constexpr (rows > 1)
    if (wanted < rows) return some_sums<rows - 1>(wanted, grad, self, vectors, n, dim, row, column, out);
  weighted_sums<rows>(grad, self, vectors, n, dim, row, column, out);
}

// Product (i, j) passes its gradient, times one vector, on to the other: (G + G^T) V with G the triangle. The
// sums of a group do not wait for each other, so groups are as large as registers allow, and alike: 27
// vectors are 7 + 7 + 7 + 6.
static inline void interact_backward(const InteractionView& view, const Vectors& vectors, const float* grad,
                                     const VectorsOf<float>& out) {
  constexpr int most = 8;
  const int n = view.vectors, groups = (n + most - 1) / most, group = (n + groups - 1) / groups;
  for (int column = 0; column < view.dim; column += Vec::width)
    for (int row = 0; row < n; row += group)
      some_sums<most>(n - row < group ? n - row : group, grad, view.self, vectors, n, view.dim, row, column,
                      out);
}

}  // namespace mprec::MPREC_ISA
