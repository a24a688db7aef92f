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

namespace mprec::MPREC_ISA {

// All but the plain sum look out for padding. Mean is a sum, divided.
enum class Pool { sum, sum_padded, weighted, max };

constexpr int max_vectors = 8;

// How a row is stored; `at` gives a register of its values from a column on.
struct F32Row {
  const float* values;
  F32Row(const char* row, int64_t) : values(reinterpret_cast<const float*>(row)) {}
  Vec at(int64_t column) const { return load(values + column); }
  Vec at(int64_t column, Mask mask) const { return load(values + column, mask); }
};

// Pools `vectors` registers of columns of one bag, from `column` on; the last register is masked if `tail`.
template <class Row, class Index, Pool pool, int vectors, bool tail>
inline bool pool_columns(const BagRequest& r, const Feature& f, int64_t begin, int64_t end, int64_t column,
                         float* out, Lookahead<Index>& ahead) {
  constexpr int64_t width = Vec::width;
  const Mask mask(tail ? f.dim - column - (vectors - 1) * width : width);
  const auto ids = static_cast<const Index*>(r.indices.data);
  Vec acc[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) acc[v] = zero();
  int64_t count = 0;

  for (int64_t i = begin; i < end;) {
    const int64_t chunk = least(i + 16, end);  // spreads the prefetches of a long bag over its reads
    if (!ahead.to(chunk)) return false;
    for (; i < chunk; ++i) {
      const int64_t id = ids[i];
      if (pool != Pool::sum && id == r.padding_idx) continue;
      const Row row(f.rows + id * f.row_bytes, f.dim);
      const Vec weight = pool == Pool::weighted ? broadcast(r.per_sample_weights[i]) : zero();
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const Vec x =
            tail && v == vectors - 1 ? row.at(column + v * width, mask) : row.at(column + v * width);
        if (pool == Pool::weighted)
          acc[v] = fma(weight, x, acc[v]);
        else if (pool == Pool::max)
          acc[v] = count == 0 ? x : greater(x, acc[v]);
        else
          acc[v] = acc[v] + x;
      }
      ++count;
    }
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
template <class Row, class Index, Pool pool>
__attribute__((noinline)) bool pool_wide(const BagRequest& r, const Feature& f, int64_t begin, int64_t end,
                                         int64_t last_column, float* out, Lookahead<Index>& ahead) {
  for (int64_t column = 0; column < last_column; column += max_vectors * Vec::width)
    if (!pool_columns<Row, Index, pool, max_vectors, false>(r, f, begin, end, column, out, ahead))
      return false;
  return true;
}

// Pools bags [begin, end) of one feature. False at an invalid offset or ID, before anything is read by it.
template <class Row, class Index, Pool pool, int vectors, bool tail>
bool pool_bags(const BagRequest& r, const Feature& f, int64_t begin, int64_t end, Lookahead<Index>& ahead) {
  constexpr int64_t block = max_vectors * Vec::width;
  const int64_t last_column = f.dim > block ? (f.dim - 1) / block * block : 0;
  const int64_t limit = ahead.limit(&f);
  float* out = f.out + (begin - f.first_bag) * f.out_stride;
  int64_t from = r.bag_begin(begin);
  if (from < 0) return false;
  for (int64_t bag = begin; bag < end; ++bag, out += f.out_stride) {
    const int64_t to = r.bag_begin(bag + 1);
    if (from > to || to > limit) return false;
    if (last_column && !pool_wide<Row, Index, pool>(r, f, from, to, last_column, out, ahead)) return false;
    if (!pool_columns<Row, Index, pool, vectors, tail>(r, f, from, to, last_column, out, ahead)) return false;
    from = to;
  }
  return true;
}

template <class Index>
using PoolBags = bool (*)(const BagRequest&, const Feature&, int64_t, int64_t, Lookahead<Index>&);

template <class Row, class Index, Pool pool, int vectors = 1>
PoolBags<Index> for_dim(int64_t dim) {
  constexpr int64_t block = max_vectors * Vec::width;
  const int64_t last = dim == 0 ? 0 : (dim - 1) % block + 1;
  if constexpr (vectors < max_vectors)
    if (last > vectors * Vec::width) return for_dim<Row, Index, pool, vectors + 1>(dim);
  if constexpr (Vec::free_masks)
    return pool_bags<Row, Index, pool, vectors, true>;
  else
    return last == vectors * Vec::width ? pool_bags<Row, Index, pool, vectors, false>
                                        : pool_bags<Row, Index, pool, vectors, true>;
}

template <class Row, class Index>
PoolBags<Index> for_pool(const BagRequest& r, int64_t dim) {
  if (r.mode == Mode::max) return for_dim<Row, Index, Pool::max>(dim);
  if (r.per_sample_weights) return for_dim<Row, Index, Pool::weighted>(dim);
  if (r.padding_idx >= 0) return for_dim<Row, Index, Pool::sum_padded>(dim);
  return for_dim<Row, Index, Pool::sum>(dim);
}

template <class Index>
bool forward_ids(const BagRequest& r, int64_t begin, int64_t end) {
  const Feature* f = r.features;
  while (f[1].first_bag <= begin) ++f;
  Lookahead<Index> ahead(r, f, begin, end);
  PoolBags<Index> pool = nullptr;
  int64_t pool_dim = -1;
  for (; begin < end; ++f) {
    if (f->dim != pool_dim) pool = for_pool<F32Row, Index>(r, pool_dim = f->dim);
    const int64_t stop = least(end, f[1].first_bag);
    if (!pool(r, *f, begin, stop, ahead)) return false;
    begin = stop;
  }
  return true;
}

inline bool forward(const BagRequest& r, int64_t begin, int64_t end) {
  if (begin >= end) return true;
  return r.indices.wide ? forward_ids<int64_t>(r, begin, end) : forward_ids<int32_t>(r, begin, end);
}

}  // namespace mprec::MPREC_ISA
