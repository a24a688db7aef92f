#include "cache/cached_dhe.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "bags/check.h"
#include "common/aligned.h"
#include "common/distinct.h"
#include "common/parallel.h"
#include "registry.h"

namespace mprec {
namespace {

// Look-ups, or floats pooled, that repay waking a thread.
constexpr int64_t lookups_per_thread = 2048, floats_per_thread = 1 << 15;

struct Part {
  const int64_t* ids;  // padding left out
  int64_t count;
  float* rows;  // of the IDs: in `out` where bags need no pooling
  int64_t stride;
  PoolArguments pool;  // vectors is null where bags need none
  int64_t *misses, *distinct_ids;
  int32_t* inverse;  // which of the distinct IDs each miss is
  int64_t num_misses, num_coded, num_distinct;
  float* decoded;  // rows of the distinct misses
};

struct Workspace {
  std::vector<int64_t> ids, kept, misses, distinct_ids;
  std::vector<int32_t> inverse, row_of_entry;
  std::vector<Part> parts;
  std::vector<DecodeWork> work;
  AlignedBuffer<float> rows, decoded;
};

uint64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int team(int64_t work, int64_t per_thread, int threads) {
  return static_cast<int>(std::clamp<int64_t>(work / per_thread, 1, threads));
}

void plan(const DheRequest& r, const int64_t* ids, const std::vector<CachedFeature>& features, Workspace& w) {
  const Bags& b = r.bags;
  const int64_t n = b.indices.size;
  w.parts.resize(features.size());
  w.misses.resize(n);
  w.distinct_ids.resize(n);
  w.inverse.resize(n);
  if (b.padding_idx >= 0) {
    w.kept.resize(n);
    w.row_of_entry.resize(n);
  }
  int64_t floats = 0;
  for (size_t t = 0; t < features.size(); ++t) {
    const CachedFeature& f = features[t];
    const int64_t dim = f.decoder.dim, begin = b.feature_begin(f.position),
                  end = b.feature_begin(f.position + 1);
    Part& p = w.parts[t];
    p = Part{};
    p.ids = ids + begin;
    p.count = end - begin;
    p.stride = dim;
    p.pool = {nullptr, dim, nullptr, nullptr, b.mode};
    p.misses = w.misses.data() + begin;
    p.distinct_ids = w.distinct_ids.data() + begin;
    p.inverse = w.inverse.data() + begin;
    if (b.padding_idx >= 0) {
      int32_t* rows = w.row_of_entry.data() + begin;
      int64_t* kept = w.kept.data() + begin;
      int32_t count = 0;
      for (int64_t i = 0; i < p.count; ++i) {
        rows[i] = p.ids[i] == b.padding_idx ? -1 : count;
        if (rows[i] >= 0) kept[count++] = p.ids[i];
      }
      p.ids = kept;
      p.count = count;
      p.pool.row_of_entry = rows;
    }
    if (b.per_sample_weights) p.pool.weights = b.per_sample_weights + begin;
    if (b.padding_idx < 0 && !b.per_sample_weights && one_id_per_bag(b, f.position)) {
      p.rows = r.out + f.column;
      p.stride = r.out_stride;
    } else {
      floats += p.count * dim;
    }
  }
  float* rows = w.rows.reserve(floats + 1);
  for (Part& p : w.parts) {
    if (p.rows) continue;
    p.pool.vectors = p.rows = rows;
    rows += p.count * p.stride;
  }
}

// Puts the rows of misses with a code in place and leaves the other misses; returns how many had one.
int64_t answer_by_code(const CodebookView& book, Part& p) {
  if (!book.count || !p.num_misses) return 0;
  const auto others =
      std::partition(p.misses, p.misses + p.num_misses, [&](int64_t i) { return !book.has(p.ids[i]); });
  const int64_t coded = p.misses + p.num_misses - others;
  codebook_rows(book, p.ids, others, coded, p.rows, p.stride);
  p.num_misses -= coded;
  return coded;
}

void look_up(const CachedFeature& f, Part& p) {
  if (f.cache) {
    p.num_misses = f.cache->lookup(p.ids, p.count, f.generation, p.rows, p.stride, p.misses);
  } else {
    for (int64_t i = 0; i < p.count; ++i) p.misses[i] = i;
    p.num_misses = p.count;
  }
  p.num_coded = answer_by_code(f.codebook, p);
  p.num_distinct = find_distinct(
      p.num_misses, -1, [&](int64_t i) { return p.ids[p.misses[i]]; }, p.distinct_ids, p.inverse);
}

// Decodes the misses of all features, and puts their rows in place and into the caches.
void decode(const std::vector<CachedFeature>& features, bool admit, int threads, Workspace& w) {
  int64_t floats = 0;
  for (const Part& p : w.parts) floats += p.num_distinct * p.pool.dim;
  float* decoded = w.decoded.reserve(floats);
  w.work.clear();
  for (size_t t = 0; t < features.size(); ++t) {
    Part& p = w.parts[t];
    if (!p.num_distinct) continue;
    p.decoded = decoded;
    decoded += p.num_distinct * p.pool.dim;
    w.work.push_back({features[t].decoder, p.distinct_ids, p.num_distinct, p.decoded, p.pool.dim});
  }
  dhe_decode(w.work, threads);
  for (size_t t = 0; t < features.size(); ++t) {
    const Part& p = w.parts[t];
    const int64_t dim = p.pool.dim;
    for (int64_t i = 0; i < p.num_misses; ++i)
      std::memcpy(p.rows + p.misses[i] * p.stride, p.decoded + p.inverse[i] * dim, dim * sizeof(float));
    if (admit && features[t].cache && p.num_distinct)
      features[t].cache->admit(p.distinct_ids, p.num_distinct, features[t].generation, p.decoded, dim);
  }
}

void pool(const DheRequest& r, const CachedFeature& f, const Part& p, int threads) {
  const auto kernel = kernels().dhe->pool;
  const Bags& b = r.bags;
  const int64_t first = b.first_bag(f.position), begin = b.bag_begin(first);
  parallel_ranges(b.batch, team(p.count * p.pool.dim, floats_per_thread, threads),
                  [&](int64_t from, int64_t to) {
                    for (int64_t i = from; i < to; ++i)
                      kernel(p.pool, b.bag_begin(first + i) - begin, b.bag_begin(first + i + 1) - begin,
                             r.out + i * r.out_stride + f.column);
                  });
}

}  // namespace

void cached_dhe_bag_forward(const DheRequest& r, const std::vector<CachedFeature>& features, bool admit,
                            int threads, CachedDheCounters& counters) {
  thread_local Workspace own;
  Workspace& w = own;  // the same object in every thread
  const uint64_t start = now();
  check_offsets(r.bags);
  plan(r, checked_ids(r.bags, r.largest_id, w.ids), features, w);
  parallel_ranges(static_cast<int64_t>(features.size()),
                  team(r.bags.indices.size, lookups_per_thread, threads), [&](int64_t from, int64_t to) {
                    for (int64_t t = from; t < to; ++t) look_up(features[t], w.parts[t]);
                  });
  const uint64_t looked_up = now();
  int64_t decoded = 0, coded = 0;
  for (const Part& p : w.parts) {
    decoded += p.num_distinct;
    coded += p.num_coded;
  }
  if (decoded) {
    decode(features, admit, threads, w);
    counters.decode_ns.fetch_add(now() - looked_up, std::memory_order_relaxed);
    counters.decoded.fetch_add(decoded, std::memory_order_relaxed);
  }
  for (size_t t = 0; t < features.size(); ++t)
    if (w.parts[t].pool.vectors) pool(r, features[t], w.parts[t], threads);
  if (coded) counters.coded.fetch_add(coded, std::memory_order_relaxed);
  counters.calls.fetch_add(1, std::memory_order_relaxed);
  counters.lookup_ns.fetch_add(looked_up - start, std::memory_order_relaxed);
}

}  // namespace mprec
