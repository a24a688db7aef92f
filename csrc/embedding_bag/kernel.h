// The embedding-bag kernel, written once over Vec; included by one file per ISA.
//
// Two cursors run over the indices. The look-ahead validates each ID once and prefetches its row some rows
// before the accumulation needs it, across bags and tables: out of cache, the time is that of the memory
// accesses in flight at once, and a bag is too short to fill the queue on its own. The accumulation keeps a
// bag's result in up to 8 registers (of AVX2's 16, the rest serve rows and weights), so that a row is read
// once and a result written once. Sums run in the order of the indices: an unweighted result does not depend
// on the ISA or on the number of threads.
#pragma once
#include "common/vec.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/lookahead.h"
#include "embedding_bag/rows.h"

namespace mprec::MPREC_ISA {

// All but the plain sum look out for padding; weights of null are ones. Mean is a sum, divided.
enum class Pool { sum, weighted, max };

constexpr int max_vectors = 8;

// Pools `vectors` registers of columns of one bag, from `column` on; the last register is masked if `tail`.
template <class Row, Pool pool, int vectors, bool tail>
inline bool pool_columns(const BagRequest& r, const Feature& f, int64_t begin, int64_t end, int64_t column,
                         float* out, Lookahead& ahead) {
  constexpr int64_t width = Vec::width;
  const Mask mask(tail ? f.dim - column - (vectors - 1) * width : width);
  Vec acc[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) acc[v] = zero();
  int64_t count = 0;
  float bias = 0;  // of quantised rows: what all columns share

  for (int64_t i = begin; i < end;) {
    const int64_t chunk = least(i + 16, end);  // spreads the prefetches of a long bag over its reads
    if (!ahead.to(chunk)) return false;
    for (; i < chunk; ++i) {
      const int64_t id = r.indices[i];
      if (pool != Pool::sum && id == r.padding_idx) continue;
      const Row row(f.rows + id * f.row_bytes, f.dim);
      const float weight = pool == Pool::weighted && r.per_sample_weights ? r.per_sample_weights[i] : 1.0f;
      Vec factor = broadcast(weight), term = zero();
      if constexpr (Row::quantised) {
        factor = broadcast(weight * row.scale);
        term = broadcast(row.bias);
        bias += weight * row.bias;
      }
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const Vec x =
            tail && v == vectors - 1 ? row.at(column + v * width, mask) : row.at(column + v * width);
        if (pool == Pool::max) {
          const Vec value = Row::quantised ? fma(factor, x, term) : x;
          acc[v] = count == 0 ? value : greater(value, acc[v]);
        } else if (pool == Pool::weighted || Row::quantised) {
          acc[v] = fma(factor, x, acc[v]);
        } else {
          acc[v] = acc[v] + x;
        }
      }
      ++count;
    }
  }

  if (Row::quantised && pool != Pool::max) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[v] = acc[v] + broadcast(bias);
  }
  if (r.mode == Mode::mean && count > 1) {
    const Vec divisor = broadcast(static_cast<float>(count));
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[v] = acc[v] / divisor;
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    if (tail && v == vectors - 1)
      store(out + column + v * width, acc[v], mask);
    else
      store(out + column + v * width, acc[v]);
  }
  return true;
}

// The whole blocks of 8 registers that come before the last columns of a wide row.
template <class Row, Pool pool>
__attribute__((noinline)) bool pool_wide(const BagRequest& r, const Feature& f, int64_t begin, int64_t end,
                                         int64_t last_column, float* out, Lookahead& ahead) {
  for (int64_t column = 0; column < last_column; column += max_vectors * Vec::width)
    if (!pool_columns<Row, pool, max_vectors, false>(r, f, begin, end, column, out, ahead)) return false;
  return true;
}

template <class T>
void copy(const float* from, T* to, int64_t size) {
  int64_t i = 0;
  for (; i + Vec::width <= size; i += Vec::width) store(to + i, load(from + i));
  if (i < size) store(to + i, load(from + i, Mask(size - i)), Mask(size - i));
}

// Pools bags [begin, end) of one feature. False at an invalid offset or ID, before anything is read by it.
template <class Row, Pool pool, int vectors, bool tail>
bool pool_bags(const BagRequest& r, const Feature& f, int64_t begin, int64_t end, Lookahead& ahead,
               float* scratch) {
  constexpr int64_t block = max_vectors * Vec::width;
  const int64_t last_column = f.dim > block ? (f.dim - 1) / block * block : 0;
  const int64_t limit = ahead.limit(&f);
  const int64_t out_bytes = f.out_stride * (f.out_format == Format::f32 ? 4 : 2);
  char* result = reinterpret_cast<char*>(f.out) + (begin - f.first_bag) * out_bytes;
  int64_t from = r.bag_begin(begin);
  if (from < 0) return false;
  for (int64_t bag = begin; bag < end; ++bag, result += out_bytes) {
    const int64_t to = r.bag_begin(bag + 1);
    if (from > to || to > limit) return false;
    float* out = f.out_format == Format::f32 ? reinterpret_cast<float*>(result) : scratch;
    if (last_column && !pool_wide<Row, pool>(r, f, from, to, last_column, out, ahead)) return false;
    if (!pool_columns<Row, pool, vectors, tail>(r, f, from, to, last_column, out, ahead)) return false;
    if (f.out_format == Format::f16) copy(out, reinterpret_cast<Half*>(result), f.dim);
    if (f.out_format == Format::bf16) copy(out, reinterpret_cast<BFloat*>(result), f.dim);
    from = to;
  }
  return true;
}

using PoolBags = bool (*)(const BagRequest&, const Feature&, int64_t, int64_t, Lookahead&, float*);

template <class Row, Pool pool, int vectors = 1>
PoolBags for_dim(int64_t dim) {
  constexpr int64_t block = max_vectors * Vec::width;
  const int64_t last = dim == 0 ? 0 : (dim - 1) % block + 1;
  if constexpr (vectors < max_vectors)
    if (last > vectors * Vec::width) return for_dim<Row, pool, vectors + 1>(dim);
  if constexpr (Vec::free_masks)
    return pool_bags<Row, pool, vectors, true>;
  else
    return last == vectors * Vec::width ? pool_bags<Row, pool, vectors, false>
                                        : pool_bags<Row, pool, vectors, true>;
}

template <class Row>
PoolBags for_pool(const BagRequest& r, int64_t dim) {
  if (r.mode == Mode::max) return for_dim<Row, Pool::max>(dim);
  if (r.per_sample_weights || r.padding_idx >= 0) return for_dim<Row, Pool::weighted>(dim);
  return for_dim<Row, Pool::sum>(dim);
}

inline PoolBags for_format(const BagRequest& r, Format format, int64_t dim) {
  switch (format) {
    case Format::f16: return for_pool<PlainRow<Half>>(r, dim);
    case Format::bf16: return for_pool<PlainRow<BFloat>>(r, dim);
    case Format::int8: return for_pool<Int8Row>(r, dim);
    case Format::int4: return for_pool<Int4Row>(r, dim);
    default: return for_pool<PlainRow<float>>(r, dim);
  }
}

inline bool forward(const BagRequest& r, int64_t begin, int64_t end, float* scratch) {
  if (begin >= end) return true;
  const Feature* f = r.features;
  while (f[1].first_bag <= begin) ++f;
  Lookahead ahead(r, f, begin, end);
  PoolBags pool = nullptr;
  const Feature* chosen_for = nullptr;
  for (; begin < end; ++f) {
    if (!chosen_for || f->dim != chosen_for->dim || f->format != chosen_for->format)
      pool = for_format(r, f->format, f->dim);
    chosen_for = f;
    const int64_t stop = least(end, f[1].first_bag);
    if (!pool(r, *f, begin, stop, ahead, scratch)) return false;
    begin = stop;
  }
  return true;
}

}  // namespace mprec::MPREC_ISA
