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

// Indices that repay waking a thread: each thread reads all of them to find its own rows.
constexpr int64_t indices_per_thread = 512;

// One thread's arrays, kept from table to table.
struct Scratch {
  std::vector<uint64_t> keys, sorted;
  std::vector<int32_t> bags;
  std::vector<float> scales, row;
  std::vector<uint32_t> histogram;
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
  const int widest = n < 4096 ? 8 : 11, passes = (bits + widest - 1) / widest;
  const int digit = (bits + passes - 1) / passes;
  const uint64_t mask = (uint64_t{1} << digit) - 1;
  s.histogram.resize(mask + 1);
  uint64_t *from = s.keys.data(), *to = s.sorted.data();
  uint32_t* const histogram = s.histogram.data();
  for (int pass = 0, shift = 32; pass < passes; ++pass, shift += digit) {
    std::fill_n(histogram, mask + 1, 0u);
    for (int64_t i = 0; i < n; ++i) ++histogram[from[i] >> shift & mask];
    uint32_t sum = 0;
    for (uint64_t d = 0; d <= mask; ++d) sum += std::exchange(histogram[d], sum);
    for (int64_t i = 0; i < n; ++i) to[histogram[from[i] >> shift & mask]++] = from[i];
    std::swap(from, to);
  }
  if (from != s.keys.data()) s.keys.swap(s.sorted);
}

// Which of `threads` handles a row: mixed, because hot rows are often neighbours.
uint32_t owner(int64_t row, int threads) {
  return static_cast<uint32_t>((static_cast<uint32_t>(row) * 0x9E3779B1u) * uint64_t(threads) >> 32);
}

template <class Index>
int64_t bag_size(const Bags& b, const Index* ids, int64_t begin, int64_t end) {
  if (b.padding_idx < 0) return end - begin;
  return end - begin - std::count(ids + begin, ids + end, b.padding_idx);
}

bool scaled(const Bags& b) { return b.per_sample_weights || b.mode == Mode::mean; }

// Gathers the entries of a feature whose rows belong to this thread. Offsets have been checked.
template <class Index, bool shared>
void collect(const Bags& b, int64_t feature, const PooledGradient& g, int thread, int threads, Scratch& s) {
  const auto ids = static_cast<const Index*>(b.indices.data);
  const bool has_scales = scaled(b);
  const int64_t first_bag = b.first_bag(feature), last_bag = b.first_bag(feature + 1);
  s.reserve(b.bag_begin(last_bag) - b.bag_begin(first_bag), has_scales, g.dim);
  uint64_t* const keys = s.keys.data();
  int32_t* const bags = s.bags.data();
  uint64_t n = 0;
  for (int64_t bag = first_bag, begin = b.bag_begin(bag), end; bag < last_bag; ++bag, begin = end) {
    end = b.bag_begin(bag + 1);
    const float divisor = b.mode == Mode::mean && end - begin > 1
                              ? static_cast<float>(std::max<int64_t>(bag_size(b, ids, begin, end), 1))
                              : 1.0f;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = ids[i];
      if (row == b.padding_idx) continue;
      if (shared && owner(row, threads) != static_cast<uint32_t>(thread)) continue;
      keys[n] = static_cast<uint64_t>(row) << 32 | n;
      bags[n] = static_cast<int32_t>(bag - first_bag);
      if (has_scales) s.scales[n] = (b.per_sample_weights ? b.per_sample_weights[i] : 1.0f) / divisor;
      ++n;
    }
  }
  s.count = static_cast<int64_t>(n);
  sort_by_row(s, g.num_rows);
}

RowGradients share(const Bags& b, int64_t feature, const PooledGradient& g, int thread, int threads,
                   Scratch& s) {
  if (b.indices.wide)
    (threads > 1 ? collect<int64_t, true> : collect<int64_t, false>)(b, feature, g, thread, threads, s);
  else
    (threads > 1 ? collect<int32_t, true> : collect<int32_t, false>)(b, feature, g, thread, threads, s);
  return {s.keys.data(), s.count,       s.bags.data(), scaled(b) ? s.scales.data() : nullptr,
          g.grad,        g.grad_stride, g.dim};
}

template <class Index>
bool all_within(const Index* ids, int64_t begin, int64_t end, int64_t num_rows) {
  bool within = true;  // no early exit: the loop is then a vector loop
  for (int64_t i = begin; i < end; ++i)
    within &= static_cast<uint64_t>(static_cast<int64_t>(ids[i])) < static_cast<uint64_t>(num_rows);
  return within;
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

}  // namespace

void update_tables(const Bags& b, const PooledGradient* gradients, const TableRows* tables,
                   const Update& update, int threads) {
  check(b, gradients);
  const auto apply = kernels().gradient->apply;
  const int parts =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, b.indices.size / indices_per_thread)));
  parallel_ranges(parts, parts, [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    for (int64_t part = first; part < last; ++part)
      for (int64_t f = 0; f < b.num_features; ++f) {
        const RowGradients g = share(b, f, gradients[f], static_cast<int>(part), parts, scratch);
        apply(g, tables[f], update, false, scratch.row.data());
      }
  });
}

int64_t sparse_gradient(const Bags& b, const PooledGradient& gradient, int64_t* rows, float* values,
                        int threads) {
  check(b, &gradient);
  Scratch scratch;
  const RowGradients all = share(b, 0, gradient, 0, 1, scratch);
  std::vector<int64_t> starts;  // of each distinct row, in all.keys
  for (int64_t i = 0; i < all.count; ++i)
    if (i == 0 || all.keys[i] >> 32 != all.keys[i - 1] >> 32) {
      rows[starts.size()] = static_cast<int64_t>(all.keys[i] >> 32);
      starts.push_back(i);
    }
  const int64_t distinct = static_cast<int64_t>(starts.size());
  starts.push_back(all.count);
  const auto apply = kernels().gradient->apply;
  const int parts =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, all.count / indices_per_thread)));
  parallel_ranges(distinct, parts, [&](int64_t first, int64_t last) {
    RowGradients part = all;
    part.keys += starts[first];
    part.count = starts[last] - starts[first];
    const TableRows target{values + first * all.dim, nullptr, nullptr, all.dim, 0};
    apply(part, target, {Rule::assign, 0, 0, 0, 0}, true, nullptr);
  });
  return distinct;
}

}  // namespace mprec
