// The embedding-bag kernel, written once over Vec; included by one file per ISA.
//
// Two cursors run over the indices. The look-ahead validates each ID once and prefetches its row some rows
// before the accumulation needs it, across bags and tables: out of cache, the time is that of the memory
// accesses in flight at once, and a bag is too short to fill the queue on its own. The accumulation keeps a
// bag's result in up to 8 registers (of AVX2's 16, the rest serve rows and weights), so that a row is read
// once and a result written once. Sums run in the order of the indices: an unweighted result does not depend
// on the ISA or on the number of threads.
#pragma once
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/lookahead.h"
#include "isa/isa.h"
#include "rows/rows.h"

namespace mprec::MPREC_ISA {

// All but the plain sum look out for padding; weights of null are ones. Mean is a sum, divided.
enum class Pool { sum, weighted, max };

constexpr int max_vectors = 8;

// What the pooling of a table's bags reads, in registers where there are enough.
struct Source {
  const void* ids;
  const char* rows;
  int64_t row_bytes, dim, padding_idx;
  const float* weights;
  bool mean;
  Source(const PoolingRequest& r, const PooledTable& t)
      : ids(r.bags.indices.data),
        rows(t.rows),
        row_bytes(t.row_bytes),
        dim(t.dim),
        padding_idx(r.bags.padding_idx),
        weights(r.bags.per_sample_weights),
        mean(r.bags.mode == Mode::mean) {}
};

// What is known of a bag whose pooling goes on.
struct Progress {
  int64_t count = 0;  // rows pooled
  float bias = 0;     // of quantised rows: what all columns share
  bool valid = true;  // no invalid ID was met
};

// Pools rows [begin, end) of a bag into `vectors` registers of columns, from `column` on; the last register
// is masked if `tail`. Goes on from `before` in `out`, and finishes the bag if `last`.
template <class Row, Pool pool, int vectors, bool tail, class Index>
__attribute__((always_inline)) inline Progress pool_columns(const Source& source, int64_t begin, int64_t end,
                                                            int64_t column, Mask mask, const Prefetch& next,
                                                            float* out, Progress before, bool last) {
  constexpr int64_t width = Vec::width;
  const Source s = source;
  const auto [shift, next_rows, next_num_rows, next_row_bytes, last_byte, next_in_l2] = next;
  const Index* const ids = static_cast<const Index*>(s.ids);
  out += column;
  Vec acc[vectors];
  int64_t count = before.count;
  float bias = before.bias;
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const bool masked = tail && v == vectors - 1;
    acc[v] = count == 0 ? zero() : masked ? load(out + v * width, mask) : load(out + v * width);
  }
  constexpr int pairs = Row::paired ? vectors / 2 : 0;
#pragma GCC unroll 4
  for (int v = 0; v < pairs; ++v) split_columns(acc[2 * v], acc[2 * v + 1]);

  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = ids[i], next_id = ids[i + shift];
    if (__builtin_expect(static_cast<uint64_t>(next_id) >= next_num_rows, 0)) return {0, 0, false};
    const char* const next_row = next_rows + next_id * next_row_bytes + column * Row::bits / 8;
    constexpr int64_t bytes = vectors * width * Row::bits / 8;
    if (bytes > 64 && next_in_l2) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < bytes; line += 64) prefetch(next_row + line);
    } else {
#pragma GCC unroll 8
      for (int64_t line = 0; line < bytes; line += 64) prefetch_l2(next_row + line);
    }
    if (last_byte) prefetch_l2(next_row + last_byte);
    if (pool != Pool::sum && id == s.padding_idx) continue;
    const Row row(s.rows + id * s.row_bytes, s.dim);
    const float weight = pool == Pool::weighted && s.weights ? s.weights[i] : 1.0f;
    Vec factor = broadcast(weight), term = zero();
    if constexpr (Row::quantised) {
      factor = broadcast(weight * row.scale);
      if constexpr (Row::biased) {
        term = broadcast(row.bias);
        bias += weight * row.bias;
      }
    }
    const auto add = [&](Vec& a, Vec x) {
      if (pool == Pool::max) {
        const Vec value = Row::quantised ? fma(factor, x, term) : x;
        a = count == 0 ? value : greater(value, a);
      } else if (pool == Pool::weighted || Row::quantised) {
        a = fma(factor, x, a);
      } else {
        a = a + x;
      }
    };
    if constexpr (Row::paired) {
#pragma GCC unroll 4
      for (int v = 0; v < pairs; ++v) {
        const bool masked = tail && 2 * v + 2 == vectors;
        const Pair x = masked ? row.pair(column + 2 * v * width, mask) : row.pair(column + 2 * v * width);
        add(acc[2 * v], x.even);
        add(acc[2 * v + 1], x.odd);
      }
    }
#pragma GCC unroll 8
    for (int v = 2 * pairs; v < vectors; ++v) {
      const bool masked = tail && v == vectors - 1;
      add(acc[v], masked ? row.at(column + v * width, mask) : row.at(column + v * width));
    }
    ++count;
  }

  if (last && pool != Pool::max) {
    if (Row::quantised) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[v] = acc[v] + broadcast(bias);
    }
    if (s.mean && count > 1) {
      const Vec divisor = broadcast(static_cast<float>(count));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[v] = acc[v] / divisor;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < pairs; ++v) join_columns(acc[2 * v], acc[2 * v + 1]);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    if (tail && v == vectors - 1)
      store(out + v * width, acc[v], mask);
    else
      store(out + v * width, acc[v]);
  }
  return {count, bias, true};
}

// A bag of many rows, or of rows wider than 8 registers: a few rows at a time, their columns in turn.
template <class Row, Pool pool, int vectors, bool tail, class Index>
__attribute__((noinline)) bool pool_long(const Source& s, int64_t begin, int64_t end, int64_t last_column,
                                         Mask mask, float* out, Lookahead& ahead) {
  Progress progress;
  do {
    const int64_t stop = least(end, begin + ahead.stride());
    Prefetch next;
    if (!ahead.next(begin, stop - begin, next)) return false;
    for (int64_t column = 0; column < last_column; column += max_vectors * Vec::width)
      pool_columns<Row, pool, max_vectors, false, Index>(s, begin, stop, column, mask, next, out, progress,
                                                         stop == end);
    progress = pool_columns<Row, pool, vectors, tail, Index>(s, begin, stop, last_column, mask, next, out,
                                                             progress, stop == end);
    if (!progress.valid) return false;
    begin = stop;
  } while (begin < end);
  return true;
}

template <class T>
void copy(const float* from, T* to, int64_t size) {
  int64_t i = 0;
  for (; i + Vec::width <= size; i += Vec::width) store(to + i, load(from + i));
  if (i < size) store(to + i, load(from + i, Mask(size - i)), Mask(size - i));
}

inline void store_result(const float* from, float* to, Format format, int64_t dim) {
  if (format == Format::f16) copy(from, reinterpret_cast<Half*>(to), dim);
  if (format == Format::bf16) copy(from, reinterpret_cast<BFloat*>(to), dim);
}

// Where a segment's results go: float32, or by way of a float32 `scratch`.
struct Results {
  Format format;
  int64_t dim, stride;  // bytes from one to the next
  float* scratch;
  Results(const PooledTable& t, float* to)
      : format(t.out_format),
        dim(t.dim),
        stride(t.out_stride * (t.out_format == Format::f32 ? 4 : 2)),
        scratch(to) {}
  float* sums(char* result) const { return scratch ? scratch : reinterpret_cast<float*>(result); }
  void finish(char* result) const {
    if (scratch) store_result(scratch, reinterpret_cast<float*>(result), format, dim);
  }
};

// Asks for the lines of a result that will be written: side by side with other tables' results, a table's are
// pages apart, out of reach of the hardware's prefetcher.
template <int vectors>
inline void own(const char* result) {
#pragma GCC unroll 8
  for (int byte = 0; byte < vectors * Vec::width * 4; byte += 64) prefetch_to_write(result + byte);
}

// Bags of few rows, no wider than 8 registers. A function of its own: all that a row needs stays in
// registers.
template <class Row, Pool pool, int vectors, bool tail, class Index>
__attribute__((noinline)) bool pool_brief(const Source& s, int64_t from, const int64_t* ends, int64_t bags,
                                          Mask mask, const Prefetch& next, const Results& to, char* result) {
  const Source source = s;
  const Prefetch ahead = next;
  const Results results = to;
  const int64_t next_ones = bags * results.stride;
  for (const int64_t* const last = ends + bags; ends != last; from = *ends++, result += results.stride) {
    own<vectors>(result + next_ones);
    if (!pool_columns<Row, pool, vectors, tail, Index>(source, from, *ends, 0, mask, ahead,
                                                       results.sums(result), {}, true)
             .valid)
      return false;
    results.finish(result);
  }
  return true;
}

// Whether the next `count` bags hold one index each: their ends are from + 1, from + 2, ...
template <class Offset>
inline bool single(const void* ends, int64_t count, int64_t from) {
  bool all = true;  // no early exit: a vector loop
  for (int64_t b = 0; b < count; ++b)
    all &= static_cast<const Offset*>(ends)[b] == static_cast<Offset>(from + b + 1);
  return all;
}

inline bool single_bags(const Bags& b, int64_t bag, int64_t count, int64_t from) {
  if (bag + count >= b.offsets.size) return false;   // the last offset may be missing
  if (b.offsets[bag + 1] != from + 1) return false;  // most often this tells
  return b.offsets.wide ? single<int64_t>(static_cast<const int64_t*>(b.offsets.data) + bag + 1, count, from)
                        : single<int32_t>(static_cast<const int32_t*>(b.offsets.data) + bag + 1, count, from);
}

// Plain sums of one row each, from index `from` on. All that a row needs stays in registers: a call of
// pool_columns for each costs twice the time of a row in cache. False at an invalid ID.
template <class Row, int vectors, bool tail, class Index>
bool pool_singles(const void* indices, int64_t from, int64_t count, const PooledTable& t, Mask mask,
                  const Prefetch& next, char* result, int64_t out_bytes, int64_t results_ahead) {
  constexpr int64_t width = Vec::width, row_bytes = vectors * width * Row::bits / 8;
  const Index* id = static_cast<const Index*>(indices) + from;
  const auto [shift, next_rows, next_num_rows, next_row_bytes, last_byte, next_in_l2] = next;
  const char* const rows = t.rows;
  const int64_t stride = t.row_bytes;
  for (const Index* const end = id + count; id != end; ++id, result += out_bytes) {
    const int64_t next_id = id[shift];
    if (__builtin_expect(static_cast<uint64_t>(next_id) >= next_num_rows, 0)) return false;
    const char* const next_row = next_rows + next_id * next_row_bytes;
#pragma GCC unroll 8
    for (int64_t byte = 0; byte < row_bytes; byte += 64) {
      prefetch_l2(next_row + byte);
      prefetch_to_write(result + results_ahead + byte * 32 / Row::bits);
    }
    if (last_byte) prefetch_l2(next_row + last_byte);
    const Row row(rows + *id * stride, 0);
    float* const out = reinterpret_cast<float*>(result);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {  // zero: a sum is never -0
      if (tail && v == vectors - 1)
        store(out + v * width, zero() + row.at(v * width, mask), mask);
      else
        store(out + v * width, zero() + row.at(v * width));
    }
  }
  return true;
}

// Pools a segment's bags, into float32 `scratch` first if given. False at an invalid offset or ID, before
// anything is read by it.
template <class Row, Pool pool, int vectors, bool tail>
bool pool_bags(const PoolingRequest& r, const Segment& segment, Lookahead& ahead, float* scratch) {
  constexpr int64_t block = max_vectors * Vec::width, most_bags = 32, most_rows = 128;
  const PooledTable& t = *segment.table;
  const int64_t last_column = t.dim > block ? (t.dim - 1) / block * block : 0;
  int64_t begin = segment.begin;
  const int64_t end = segment.end;
  // No bag may reach beyond: the indices there are validated for another segment.
  const int64_t limit = clamped_begin(r.bags, end);
  const Source source(r, t);
  const auto brief_bags = r.bags.indices.wide ? pool_brief<Row, pool, vectors, tail, int64_t>
                                              : pool_brief<Row, pool, vectors, tail, int32_t>;
  const auto long_bag = r.bags.indices.wide ? pool_long<Row, pool, vectors, tail, int64_t>
                                            : pool_long<Row, pool, vectors, tail, int32_t>;
  const Mask mask(t.dim - last_column - (vectors - 1) * Vec::width);
  const Results results(t, scratch);
  char* result = reinterpret_cast<char*>(t.out) + (begin - t.first_bag) * results.stride;
  constexpr int64_t results_ahead = 16;
  int64_t from = r.bags.bag_begin(begin);
  if (from < 0) return false;
  while (begin < end) {
    // The ends of the next bags, of about `stride` rows together.
    const int64_t stride = ahead.stride();
    if constexpr (pool == Pool::sum && !Row::quantised) {
      const int64_t count = least(least(stride, most_bags), end - begin);
      if (last_column == 0 && !scratch && from + count <= limit && single_bags(r.bags, begin, count, from)) {
        Prefetch next{};
        if (!ahead.next(from, count, next)) return false;
        const auto pool_them = r.bags.indices.wide ? pool_singles<Row, vectors, tail, int64_t>
                                                   : pool_singles<Row, vectors, tail, int32_t>;
        if (!pool_them(r.bags.indices.data, from, count, t, mask, next, result, results.stride,
                       results_ahead * results.stride))
          return false;
        begin += count;
        from += count;
        result += count * results.stride;
        continue;
      }
    }
    int64_t ends[most_bags], bags = 0, before = from;
    do {
      const int64_t to = r.bags.bag_begin(++begin);
      if (before > to || to > limit) return false;
      ends[bags++] = before = to;
    } while (begin < end && bags < most_bags && before - from < stride);

    if (last_column == 0 && before - from <= most_rows) {
      Prefetch next;
      if (!ahead.next(from, before - from, next) ||
          !brief_bags(source, from, ends, bags, mask, next, results, result))
        return false;
      from = before;
      result += bags * results.stride;
      continue;
    }
    for (int64_t b = 0; b < bags; from = ends[b++], result += results.stride) {
      own<vectors>(result + bags * results.stride);
      if (!long_bag(source, from, ends[b], last_column, mask, results.sums(result), ahead)) return false;
      results.finish(result);
    }
  }
  return true;
}

using PoolBags = bool (*)(const PoolingRequest&, const Segment&, Lookahead&, float*);

template <class Row, Pool pool, int vectors = 1>
PoolBags for_dim(int64_t dim) {
  constexpr int64_t block = max_vectors * Vec::width;
  const int64_t last = dim == 0 ? 0 : (dim - 1) % block + 1;
  if constexpr (vectors < max_vectors)
    if (last > vectors * Vec::width) return for_dim<Row, pool, vectors + 1>(dim);
  // A masked load is an instruction of its own, beside the sum's: where rows come from memory, time goes with
  // how many rows the processor holds in flight, which is so many instructions.
  if constexpr (Vec::free_masks && (Row::quantised || pool != Pool::sum || Vec::width == 1))
    return pool_bags<Row, pool, vectors, true>;
  else
    return last == vectors * Vec::width ? pool_bags<Row, pool, vectors, false>
                                        : pool_bags<Row, pool, vectors, true>;
}

template <class Row>
PoolBags for_pool(const PoolingRequest& r, int64_t dim) {
  if (r.bags.mode == Mode::max) return for_dim<Row, Pool::max>(dim);
  if (r.bags.per_sample_weights || r.bags.padding_idx >= 0) return for_dim<Row, Pool::weighted>(dim);
  return for_dim<Row, Pool::sum>(dim);
}

inline PoolBags for_format(const PoolingRequest& r, Format format, int64_t dim) {
  switch (format) {
#define MPREC_CASE(name, Row, users) \
  case Format::name: return for_pool<Row>(r, dim);
    MPREC_ALL_FORMATS(MPREC_CASE)
#undef MPREC_CASE
  }
  __builtin_unreachable();
}

inline bool forward(const PoolingRequest& r, const Cut& begin, const Cut& end, float* scratch) {
  Walk walk(r, begin, end);
  Lookahead ahead(r, begin, end);
  PoolBags pool = nullptr;
  const PooledTable* chosen_for = nullptr;
  for (Segment s; walk.next(s);) {
    const PooledTable* t = s.table;
    if (!chosen_for || t->dim != chosen_for->dim || t->format != chosen_for->format)
      pool = for_format(r, t->format, t->dim);
    chosen_for = t;
    if (!pool(r, s, ahead, t->out_format == Format::f32 ? nullptr : scratch)) return false;
  }
  return true;
}

extern const EmbeddingBagKernels embedding_bag_kernels = {forward};

}  // namespace mprec::MPREC_ISA
