#include "gradient/gradient.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "bags/check.h"
#include "common/parallel.h"
#include "registry.h"

namespace mprec {
namespace {

// Indices that repay waking a thread: some 100 us of work, where sleepers take 50 to 100 to come.
constexpr int64_t indices_per_thread = 2048;

// One thread's arrays, kept from table to table.
struct Scratch {
  std::vector<uint64_t> keys, sorted;
  std::vector<int32_t> bags;
  std::vector<char> used;
  std::vector<float> scales, row, sums;
  std::vector<uint32_t> histograms;
  int64_t count = 0;

  void reserve(int64_t entries, bool scaled, int64_t dim) {
    const size_t n = static_cast<size_t>(entries);
    if (keys.size() < n) keys.resize(n), sorted.resize(n), bags.resize(n);
    if (scaled && scales.size() < n) scales.resize(n);
    if (row.size() < static_cast<size_t>(dim)) row.resize(dim);
  }
};

// Least-significant-digit radix sort by row; stable, so entries of a row keep the indices' order.
void sort_by_row(Scratch& s, int64_t num_rows) {
  const int64_t n = s.count;
  if (n <= 32) {
    std::sort(s.keys.begin(), s.keys.begin() + n);  // keys are distinct: the entry breaks ties
    return;
  }
  int bits = 1;
  while ((num_rows - 1) >> bits) ++bits;
  // Histograms of 2^11 fit the first-level cache; for few keys, clearing them costs more than a pass.
  const int widest = n < 1024 ? 8 : 11, passes = (bits + widest - 1) / widest;
  const int digit = (bits + passes - 1) / passes;
  const uint64_t size = uint64_t{1} << digit, mask = size - 1;
  s.histograms.assign(size * passes, 0);
  uint64_t *from = s.keys.data(), *to = s.sorted.data();
  for (int64_t i = 0; i < n; ++i) {
    uint64_t row = from[i] >> 32;
    for (int pass = 0; pass < passes; ++pass, row >>= digit) ++s.histograms[pass * size + (row & mask)];
  }
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t *const begins = s.histograms.data() + pass * size, sum = 0;
    const int shift = 32 + pass * digit;
    for (uint64_t d = 0; d < size; ++d) sum += std::exchange(begins[d], sum);
    for (int64_t i = 0; i < n; ++i) to[begins[from[i] >> shift & mask]++] = from[i];
    std::swap(from, to);
  }
  if (from != s.keys.data()) s.keys.swap(s.sorted);
}

// Rows of one table that are updated together: those of `parts` shares that a hash gives to this one.
struct Share {
  int64_t feature, part, parts;

  // Mixed, because hot rows are often neighbours.
  bool has(int64_t row) const {
    return static_cast<int64_t>((static_cast<uint32_t>(row) * 0x9E3779B1u) * static_cast<uint64_t>(parts) >>
                                32) == part;
  }
};

template <class Offset>
bool counts_up(const Offset* offsets, int64_t count) {
  Offset off = 0;  // no early exit, for a vector loop
  for (int64_t i = 0; i < count; ++i) off |= offsets[i] ^ (offsets[0] + static_cast<Offset>(i));
  return off == 0;
}

// Whether all of a feature's bags hold one ID.
bool one_each(const Bags& b, int64_t feature) {
  const int64_t first = b.first_bag(feature), bags = b.first_bag(feature + 1) - first;
  if (b.bag_begin(first + bags) - b.bag_begin(first) != bags) return false;
  return b.offsets.wide ? counts_up(static_cast<const int64_t*>(b.offsets.data) + first, bags)
                        : counts_up(static_cast<const int32_t*>(b.offsets.data) + first, bags);
}

template <class Index>
int64_t bag_size(const Bags& b, const Index* ids, int64_t begin, int64_t end) {
  if (b.padding_idx < 0) return end - begin;
  return end - begin - std::count(ids + begin, ids + end, b.padding_idx);
}

bool scaled(const Bags& b) { return b.per_sample_weights || b.mode == Mode::mean; }

// Gathers the entries of the share's rows. Offsets have been checked.
template <class Index, bool shared>
void collect(const Bags& b, const PooledGradient& g, const Share& share, Scratch& s) {
  const auto ids = static_cast<const Index*>(b.indices.data);
  const bool has_scales = scaled(b);
  const int64_t first_bag = b.first_bag(share.feature), last_bag = b.first_bag(share.feature + 1);
  s.reserve(b.bag_begin(last_bag) - b.bag_begin(first_bag), has_scales, g.dim);
  uint64_t* const keys = s.keys.data();
  int32_t* const bags = s.bags.data();
  uint64_t n = 0;
  if (!shared && !b.per_sample_weights && b.padding_idx < 0 && one_each(b, share.feature)) {
    const Index* own = ids + b.bag_begin(first_bag);
    s.count = last_bag - first_bag;
    for (int64_t i = 0; i < s.count; ++i) {
      keys[i] = static_cast<uint64_t>(own[i]) << 32 | static_cast<uint64_t>(i);
      bags[i] = static_cast<int32_t>(i);
    }
    if (has_scales) std::fill_n(s.scales.data(), s.count, 1.0f);
    return;
  }
  for (int64_t bag = first_bag, begin = b.bag_begin(bag), end; bag < last_bag; ++bag, begin = end) {
    end = b.bag_begin(bag + 1);
    const float divisor = b.mode == Mode::mean && end - begin > 1
                              ? static_cast<float>(std::max<int64_t>(bag_size(b, ids, begin, end), 1))
                              : 1.0f;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = ids[i];
      if (row == b.padding_idx) continue;
      if (shared && !share.has(row)) continue;
      keys[n] = static_cast<uint64_t>(row) << 32 | n;
      bags[n] = static_cast<int32_t>(bag - first_bag);
      if (has_scales) s.scales[n] = (b.per_sample_weights ? b.per_sample_weights[i] : 1.0f) / divisor;
      ++n;
    }
  }
  s.count = static_cast<int64_t>(n);
}

// The entries of the share's rows, in the order of the indices.
RowGradients collected(const Bags& b, const PooledGradient& g, const Share& share, Scratch& s) {
  if (b.indices.wide)
    (share.parts > 1 ? collect<int64_t, true> : collect<int64_t, false>)(b, g, share, s);
  else
    (share.parts > 1 ? collect<int32_t, true> : collect<int32_t, false>)(b, g, share, s);
  return {s.keys.data(), s.count,       s.bags.data(), scaled(b) ? s.scales.data() : nullptr,
          g.grad,        g.grad_stride, g.dim,         g.narrow};
}

RowGradients sorted(const Bags& b, const PooledGradient& g, const Share& share, Scratch& s) {
  RowGradients of = collected(b, g, share, s);
  sort_by_row(s, g.num_rows);
  of.keys = s.keys.data();
  return of;
}

// Rows so few that their sums stay in the L2 cache, and that most have a gradient.
bool sums_fit(const PooledGradient& g, int64_t entries) {
  return g.num_rows <= 2 * entries && g.num_rows * g.dim <= int64_t{1} << 16;
}

// One entry for each row that has any: its sum, which is added up in the order of the indices, as `sorted`
// would have it. Gradients are then read sample after sample, and nothing is sorted.
RowGradients summed(const Bags& b, const PooledGradient& g, const Share& share, Format format, Scratch& s) {
  const RowGradients terms = collected(b, g, share, s);
  s.sums.assign(g.num_rows * g.dim, 0.0f);
  s.used.assign(g.num_rows, false);
  kernels().gradient->add(terms, format, s.sums.data());
  for (int64_t i = 0; i < terms.count; ++i) s.used[terms.keys[i] >> 32] = true;
  if (s.bags.size() < static_cast<size_t>(g.num_rows)) s.bags.resize(g.num_rows);
  if (s.sorted.size() < static_cast<size_t>(g.num_rows)) s.sorted.resize(g.num_rows);
  int64_t distinct = 0;
  for (int64_t row = 0; row < g.num_rows; ++row) {
    s.sorted[distinct] = static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(distinct);
    s.bags[distinct] = static_cast<int32_t>(row);
    distinct += s.used[row];
  }
  return {s.sorted.data(), distinct, s.bags.data(), nullptr, s.sums.data(), g.dim, g.dim};
}

template <class Index>
bool all_within(const Index* ids, int64_t begin, int64_t end, int64_t num_rows) {
  uint64_t signs = 0;  // of any ID, or of any difference to the largest: no early exit, for a vector loop
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
    signs |= id | (static_cast<uint64_t>(num_rows - 1) - id);
  }
  return static_cast<int64_t>(signs) >= 0;
}

// Everything is checked before anything is written: a failed call leaves the tables as they were.
void check(const Bags& b, const PooledGradient* gradients) {
  if (b.mode == Mode::max)
    throw std::invalid_argument("mode: max has no row gradients; expected sum or mean");
  constexpr int64_t limit = std::numeric_limits<uint32_t>::max();
  if (b.indices.size > limit) throw std::invalid_argument("indices: more than 2^32 are not supported");
  check_offsets(b);
  bool within = true;
  for (int64_t f = 0; f < b.num_features; ++f) {
    const int64_t num_rows = gradients[f].num_rows, begin = b.feature_begin(f), end = b.feature_begin(f + 1);
    if (num_rows > limit)
      throw std::invalid_argument(
          message("weights: tables of more than 2^32 rows are not supported, got ", num_rows));
    within &= b.indices.wide ? all_within(static_cast<const int64_t*>(b.indices.data), begin, end, num_rows)
                             : all_within(static_cast<const int32_t*>(b.indices.data), begin, end, num_rows);
  }
  if (within) return;
  Bounds bounds;
  for (int64_t f = 0; f < b.num_features; ++f) bounds.emplace_back(f, gradients[f].num_rows);
  throw_first_error(b, bounds);
}

// How many of `threads` repay waking them.
int worth(int threads, int64_t indices) {
  return static_cast<int>(std::clamp<int64_t>(indices / indices_per_thread, 1, threads));
}

// Shares of nearly equal numbers of indices, so small that threads that take one by one end together. A table
// is read once for each of its shares: so most are whole tables.
std::vector<Share> plan(const Bags& b, int threads) {
  const int64_t large = b.indices.size / (2 * threads);
  std::vector<Share> shares;
  for (int64_t f = 0; f < b.num_features; ++f) {
    const int64_t n = b.feature_begin(f + 1) - b.feature_begin(f);
    const int64_t parts = threads == 1 || n == 0 ? 1 : (n + large - 1) / large;
    for (int64_t part = 0; part < parts; ++part) shares.push_back({f, part, parts});
  }
  return shares;
}

// Whether two of the tables have memory in common: then they are updated one after the other.
bool overlap(const Bags& b, const PooledGradient* gradients, const TableRows* tables) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (int64_t f = 0; f < b.num_features; ++f) {
    const auto weight = static_cast<const char*>(tables[f].weight);
    const int64_t row_bytes = tables[f].weight_stride * traits(tables[f].format).bits / 8;
    spans.emplace_back(weight, weight + gradients[f].num_rows * row_bytes);
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

}  // namespace

void update_tables(const Bags& b, const PooledGradient* gradients, const TableRows* tables,
                   const Update& update, int threads) {
  check(b, gradients);
  const auto apply = kernels().gradient->apply;
  threads = overlap(b, gradients, tables) ? 1 : worth(threads, b.indices.size);
  const std::vector<Share> shares = plan(b, threads);
  parallel_parts(static_cast<int64_t>(shares.size()), threads, [&](int64_t i, int) {
    static thread_local Scratch scratch;
    const int64_t feature = shares[i].feature;
    const PooledGradient& of = gradients[feature];
    const int64_t entries = b.feature_begin(feature + 1) - b.feature_begin(feature);
    const RowGradients g = shares[i].parts == 1 && sums_fit(of, entries)
                               ? summed(b, of, shares[i], tables[feature].format, scratch)
                               : sorted(b, of, shares[i], scratch);
    apply(g, tables[feature], update, false, scratch.row.data());
  });
}

int64_t sparse_gradient(const Bags& b, const PooledGradient& gradient, int64_t* rows, float* values,
                        int threads) {
  check(b, &gradient);
  Scratch scratch;
  const RowGradients all = sorted(b, gradient, {0, 0, 1}, scratch);
  std::vector<int64_t> starts;  // of each distinct row, in all.keys
  for (int64_t i = 0; i < all.count; ++i)
    if (i == 0 || all.keys[i] >> 32 != all.keys[i - 1] >> 32) {
      rows[starts.size()] = static_cast<int64_t>(all.keys[i] >> 32);
      starts.push_back(i);
    }
  const int64_t distinct = static_cast<int64_t>(starts.size());
  starts.push_back(all.count);
  const auto apply = kernels().gradient->apply;
  parallel_ranges(distinct, worth(threads, all.count), [&](int64_t first, int64_t last) {
    RowGradients part = all;
    part.keys += starts[first];
    part.count = starts[last] - starts[first];
    const TableRows target{values + first * all.dim, nullptr, nullptr, all.dim, 0};
    apply(part, target, {Rule::assign, 0, 0, 0, 0}, true, nullptr);
  });
  return distinct;
}

}  // namespace mprec
