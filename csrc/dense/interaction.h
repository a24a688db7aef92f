// Dot products of all pairs of a sample's vectors: the lower triangle of V V^T, and nothing else.
//
// A sample's vectors are transposed once, to [dim][vectors]: then a step over `dim` loads a register of
// columns and one word for each row from one line, at constant offsets, and adds rows x registers products.
// Rows come in groups of 8 (AVX2: 4), of which each group takes only the registers that its longest row
// needs: of 27 vectors 576 products of registers, where the whole square has 864 and the triangle 351.
#pragma once
#include "common/vec.h"
#include "dense/dense.h"
#include "dhe/gemm.h"

namespace mprec::MPREC_ISA {

// rows[i * stride + j], i < count <= width, j < columns <= width, to out[j * pitch + i]; zeros for i >=
// count.
#if defined(__AVX512F__)
inline void transpose_tile(const float* rows, int64_t stride, int count, int columns, float* out,
                           int64_t pitch) {
  __m512 r[16], t[16];
  const Mask mask(columns);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < count ? load(rows + i * stride, mask).v : _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // quads of rows: 4 x 4 within each 128 bits
    const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]),
                 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // then 4 x 4 of those
    const __m512 a = _mm512_shuffle_f32x4(t[k], t[k + 4], 0x88),
                 b = _mm512_shuffle_f32x4(t[k], t[k + 4], 0xDD),
                 c = _mm512_shuffle_f32x4(t[k + 8], t[k + 12], 0x88),
                 d = _mm512_shuffle_f32x4(t[k + 8], t[k + 12], 0xDD);
    r[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[k + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    r[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[k + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j)
    if (j < columns) store(out + j * pitch, Vec{r[j]});
}
#elif defined(__AVX2__)
inline void transpose_tile(const float* rows, int64_t stride, int count, int columns, float* out,
                           int64_t pitch) {
  __m256 r[8], t[8];
  const Mask mask(columns);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    r[i] = i >= count    ? _mm256_setzero_ps()
           : columns < 8 ? load(rows + i * stride, mask).v
                         : load(rows + i * stride).v;
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]),
                 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm256_permute2f128_ps(t[k], t[k + 4], 0x20);
    r[k + 4] = _mm256_permute2f128_ps(t[k], t[k + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    if (j < columns) store(out + j * pitch, Vec{r[j]});
}
#else
inline void transpose_tile(const float* rows, int64_t, int count, int, float* out, int64_t) {
  *out = count > 0 ? *rows : 0.0f;
}
#endif

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

#if defined(__AVX512F__)
constexpr int group_rows = 8, group_vectors = 2;
#elif defined(__AVX2__)
constexpr int group_rows = 4, group_vectors = 2;
#else
constexpr int group_rows = 4, group_vectors = 4;
#endif

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
void weighted_sums(const float* weights, int64_t pitch, const float* vectors, int n, int dim, int row,
                   int column, float* out) {
  const Mask mask(dim - column < Vec::width ? dim - column : Vec::width);
  Vec sum[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sum[r] = zero();
  const float *w = weights + row, *v = vectors + column;
  for (int j = 0; j < n; ++j, w += pitch, v += dim) {
    const Vec x = load(v, mask);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = accumulate(broadcast(w[r]), x, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) store(out + (row + r) * int64_t{dim} + column, sum[r], mask);
}

template <int rows>
inline void some_sums(int wanted, const float* weights, int64_t pitch, const float* vectors, int n, int dim,
                      int row, int column, float* out) {
  if constexpr (rows > 1)
    if (wanted < rows) return some_sums<rows - 1>(wanted, weights, pitch, vectors, n, dim, row, column, out);
  weighted_sums<rows>(weights, pitch, vectors, n, dim, row, column, out);
}

// Product (i, j) passes its gradient, times one vector, on to the other: (G + G^T) V with G the triangle.
static inline void interact_backward(const InteractionView& view, const float* vectors, const float* grad,
                                     int64_t samples, float* symmetric, float* out) {
  const int n = view.vectors, dim = view.dim;
  const int64_t pitch = (n + 15) / 16 * 16, stride = int64_t{n} * dim;
  for (int64_t s = 0; s < samples; ++s, vectors += stride, out += stride) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i; ++j) symmetric[i * pitch + j] = symmetric[j * pitch + i] = *grad++;
      symmetric[i * (pitch + 1)] = view.self ? 2 * *grad++ : 0.0f;
    }
    for (int column = 0; column < dim; column += Vec::width)
      for (int row = 0; row < n; row += group_rows)
        some_sums<group_rows>(n - row < group_rows ? n - row : group_rows, symmetric, pitch, vectors, n, dim,
                              row, column, out);
  }
}

}  // namespace mprec::MPREC_ISA
