// The row cache, codebooks, and deep hash embedding bags behind both, with arrays that end where their page
// ends. None of these has kernels of its own; the bags call the decoder's of the table in use.
#include <algorithm>
#include <atomic>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "cache/cached_dhe.h"
#include "cache/codebook.h"
#include "cache/row_cache.h"
#include "check.h"
#include "common/distinct.h"
#include "dhe_network.h"
#include "guarded.h"
#include "suites.h"

namespace mprec::test {
namespace {

// Row `id` of a stream whose rows tell which ID and which generation they belong to.
float value_of(int64_t id, uint32_t generation, int64_t column) {
  return static_cast<float>(id * 256 + column) + 0.25f * static_cast<float>(generation % 4);
}

void rows_of(const int64_t* ids, int64_t n, uint32_t generation, int64_t dim, float* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = value_of(ids[i], generation, d);
}

void test_rows(int64_t dim) {
  Case c("row cache of dim " + std::to_string(dim));
  const int64_t budget = RowCache::bytes_for(dim, 60) + 7;  // 7 bytes are too few for anything
  RowCache cache(dim, budget);
  c.expect(cache.nbytes() <= budget && cache.capacity() == 60, "holds ", cache.capacity(), " rows in ",
           cache.nbytes(), " bytes");
  Random random(dim);
  int64_t hits = 0;
  for (int step = 0; step < 60; ++step) {
    if (step == 30) cache.invalidate();
    const uint32_t generation = cache.generation();
    const int64_t n = step % 7 == 0 ? 0 : 1 + random.below(70), stride = dim + step % 3;
    Guarded<int64_t> ids(n), misses(n);
    Guarded<float> out(n ? (n - 1) * stride + dim : 0);
    for (int64_t i = 0; i < n; ++i) ids[i] = random.below(50) * random.below(3);  // skewed
    const int64_t missing = cache.lookup(ids.data(), n, generation, out.data(), stride, misses.data());
    c.expect(std::is_sorted(misses.data(), misses.data() + missing), "misses are not ascending");
    const std::set<int64_t> missed(misses.data(), misses.data() + missing);
    c.expect(static_cast<int64_t>(missed.size()) == missing, "a miss is listed twice");
    if (step == 30) c.expect(missing == n, "rows of a past generation are found");
    for (int64_t i = 0; i < n; ++i) {
      if (missed.count(i)) continue;
      ++hits;
      for (int64_t d = 0; d < dim; ++d)
        c.close(out[i * stride + d], value_of(ids[i], generation, d), 0, "ID ", ids[i], " column ", d);
    }
    Guarded<float> rows(n * dim);
    rows_of(ids.data(), n, generation, dim, rows.data());
    if (step % 2)
      cache.fill(ids.data(), n, generation, rows.data(), dim);
    else
      cache.admit(ids.data(), n, generation, rows.data(), dim);
  }
  const RowCacheStats s = cache.stats();
  c.expect(hits > 100 && s.hits == static_cast<uint64_t>(hits), hits, " hits, counted ", s.hits);
  Guarded<int64_t> held(cache.size());
  c.expect(cache.ids(cache.generation(), held.data(), held.size()) == held.size(), "size");
  const std::set<int64_t> distinct_held(held.data(), held.data() + held.size());
  c.expect(static_cast<int64_t>(distinct_held.size()) == held.size(), "an ID is held twice");
}

void test_distinct() {
  Case c("distinct IDs");
  Random random(3);
  for (int64_t n : {1, 2, 8, 9, 500}) {
    Guarded<int64_t> ids(n), found(n);
    Guarded<int32_t> place(n);
    for (int64_t i = 0; i < n; ++i) ids[i] = i % 5 ? random.below(n) : largest_id - random.below(3);
    const int64_t skip = n > 8 ? ids[1] : -1;
    const int64_t count =
        find_distinct(n, skip, [&](int64_t i) { return ids[i]; }, found.data(), place.data());
    std::set<int64_t> want;
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] == skip) {
        c.expect(place[i] == -1, "entry ", i, " is to be skipped");
        continue;
      }
      want.insert(ids[i]);
      c.expect(place[i] >= 0 && place[i] < count && found[place[i]] == ids[i], "entry ", i);
    }
    c.expect(static_cast<int64_t>(want.size()) == count, "of ", n, ": ", count, ", want ", want.size());
  }
}

// Codes and centroids with whole numbers for values: sums are exact in any order.
struct Book {
  Guarded<uint8_t> codes;
  Guarded<float> centroids;
  CodebookView view;
  Book(int64_t count, int stages, int64_t dim, Random& random)
      : codes(count * stages), centroids(256 * stages * dim) {
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(random.below(256));
    for (int64_t i = 0; i < centroids.size(); ++i) centroids[i] = static_cast<float>(random.below(1000));
    view = {codes.data(), count, stages, centroids.data(), dim};
  }
  double value(int64_t id, int64_t column) const {
    double sum = 0;
    for (int s = 0; s < view.stages; ++s)
      sum += centroids[(256 * s + codes[id * view.stages + s]) * view.dim + column];
    return sum;
  }
};

void test_codebook() {
  Case c("codebook rows");
  Random random(4);
  for (int stages : {1, 2, 3, 8})
    for (int64_t dim : {1, 5, 16, 33})
      for (int64_t n : {0, 1, 15, 16, 40}) {
        const Book book(30, stages, dim, random);
        const int64_t stride = dim + 2;
        Guarded<int64_t> ids(n);
        Guarded<float> out(n ? (n - 1) * stride + dim : 0);
        for (int64_t i = 0; i < n; ++i) ids[i] = i ? random.below(30) : 29;
        codebook_rows(book.view, ids.data(), nullptr, n, out.data(), stride);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t d = 0; d < dim; ++d)
            c.close(out[i * stride + d], book.value(ids[i], d), 0, "row ", i, " column ", d);
      }
}

// Bags of IDs below `vocabulary` behind caches, again and again, so that hits, misses and codes are mixed.
void test_cached_bags(const std::string& isa, int threads) {
  Case c(isa + " cached dhe bags, " + std::to_string(threads) + " thread(s)");
  constexpr int64_t vocabulary = 24;
  Random random(9);
  const Network first(HashFamily::universal, {40, 18, 5}, Activation::relu, Activation::sigmoid, random),
      second(HashFamily::sign, {33, 12}, Activation::mish, Activation::none, random);
  const Network* const networks[] = {&first, &second};
  const Decoder decoders[] = {first.decoder(), second.decoder()};
  const int64_t positions[] = {0, 2}, columns[] = {13, 0}, stride = 20;  // feature 1 is a table, say
  const Book book(vocabulary / 3, 2, 12, random);
  std::vector<std::vector<std::vector<Unit>>> vectors(2);
  for (int t = 0; t < 2; ++t)
    for (int64_t id = 0; id < vocabulary; ++id) vectors[t].push_back(networks[t]->vector(id));

  for (const bool single : {true, false})  // one ID in each bag, or none to five
    for (int mode : {0, 1, 2})
      for (bool by_code : {false, true}) {
        std::unique_ptr<RowCache> caches[2];
        std::vector<CachedFeature> features;
        for (int t = 0; t < 2; ++t) {
          caches[t] = std::make_unique<RowCache>(networks[t]->dim(),
                                                 RowCache::bytes_for(networks[t]->dim(), vocabulary / 2));
          features.push_back({decoders[t].view(), caches[t].get(), caches[t]->generation(), positions[t],
                              columns[t], t == 1 && by_code ? book.view : CodebookView{}});
        }
        CachedDheCounters counters;
        for (int step = 0; step < 4; ++step) {
          const int64_t bags = 1 + step * (threads > 1 ? 200 : 7);
          std::vector<int64_t> ends{0};
          for (int64_t b = 0; b < 3 * bags; ++b) ends.push_back(ends.back() + (single ? 1 : random.below(6)));
          Guarded<int64_t> ids(ends.back()), offsets(3 * bags + 1);
          std::copy(ends.begin(), ends.end(), offsets.data());
          for (int64_t i = 0; i < ids.size(); ++i) ids[i] = random.below(1 + random.below(vocabulary));
          Guarded<float> out((bags - 1) * stride + 18);
          const Bags batch{{ids.data(), ids.size(), true},
                           {offsets.data(), offsets.size(), true},
                           nullptr,
                           3,
                           bags,
                           nullptr,
                           static_cast<Mode>(mode)};
          cached_dhe_bag_forward({batch, out.data(), stride}, features, true, threads, counters);
          for (int t = 0; t < 2; ++t)
            for (int64_t b = 0; b < bags; ++b)
              for (int64_t d = 0; d < networks[t]->dim(); ++d) {
                const int64_t begin = ends[positions[t] * bags + b], end = ends[positions[t] * bags + b + 1];
                double sum = 0, largest = -INFINITY, bound = 0;
                for (int64_t i = begin; i < end; ++i) {
                  const bool coded = features[t].codebook.has(ids[i]);
                  const Unit u = coded ? Unit{book.value(ids[i], d), 0} : vectors[t][ids[i]][d];
                  sum += u.value;
                  largest = std::max(largest, u.value);
                  bound += u.bound + 8 * eps * std::fabs(u.value);
                }
                const auto count = static_cast<double>(end - begin);
                const double want = count == 0 ? 0 : mode == 2 ? largest : mode == 1 ? sum / count : sum;
                c.close(out[b * stride + columns[t] + d], want, bound, "mode ", mode, " step ", step,
                        " feature ", t, " bag ", b, " column ", d);
              }
        }
        for (int t = 0; t < 2; ++t)
          c.expect(by_code || caches[t]->stats().hits > 0, "no hits: the test tests no cache");
        c.expect(by_code == (counters.coded > 0), "coded: ", counters.coded.load());
      }
}

// Readers and writers of one cache while generations pass: a row that is found is the ID's own, whole, and of
// the generation asked for.
void test_threads(int threads) {
  Case c("row cache, " + std::to_string(threads) + " threads at once");
  constexpr int64_t dim = 24, n = 64;
  RowCache cache(dim, RowCache::bytes_for(dim, 90));
  std::atomic<int64_t> wrong{0}, hits{0};
  const auto work = [&](int thread) {
    Random random(thread);
    std::vector<int64_t> ids(n), misses(n);
    std::vector<float> out(n * dim), rows(n * dim);
    for (int step = 0; step < 400; ++step) {
      if (thread == 0 && step % 50 == 49) cache.invalidate();
      const uint32_t generation = cache.generation();
      for (int64_t& id : ids) id = random.below(1 + random.below(300));
      const int64_t missing = cache.lookup(ids.data(), n, generation, out.data(), dim, misses.data());
      int64_t next = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (next < missing && misses[next] == i) {
          ++next;
          continue;
        }
        ++hits;
        for (int64_t d = 0; d < dim; ++d) wrong += out[i * dim + d] != value_of(ids[i], generation, d);
      }
      rows_of(ids.data(), n, generation, dim, rows.data());
      cache.admit(ids.data(), n, generation, rows.data(), dim);
    }
  };
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) team.emplace_back(work, t);
  for (std::thread& t : team) t.join();
  c.expect(wrong == 0, wrong.load(), " values of another row, ID or generation");
  c.expect(hits > 1000, "only ", hits.load(), " hits");
}

}  // namespace

void cache_suite(const std::string& isa, int threads) {
  for (int64_t dim : {1, 3, 4, 18, 64, 150}) test_rows(dim);
  test_distinct();
  test_codebook();
  test_cached_bags(isa, threads);
  if (threads > 1) test_threads(threads);
}

}  // namespace mprec::test
