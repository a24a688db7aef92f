#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "bags/check.h"
#include "common/parallel.h"
#include "registry.h"
#include "rows/rows.h"

namespace mprec {
namespace {

// Work that repays waking a thread, in cache lines touched.
constexpr int64_t lines_per_thread = 1024;
// A bag's own cost (offsets, the store of its result) against a row's cache lines.
constexpr int64_t bag_cost = 2;

int64_t clamped_begin(const Bags& b, int64_t bag) {
  return std::clamp<int64_t>(b.bag_begin(bag), 0, b.indices.size);
}

int64_t row_cost(const PooledTable& t) { return scalar::row_size(t.format, t.dim) / 64 + 1; }

// Cost of a table's bags [begin, end).
int64_t cost(const Bags& b, const PooledTable& t, int64_t begin, int64_t end) {
  const int64_t indices = clamped_begin(b, end) - clamped_begin(b, begin);
  return std::max<int64_t>(indices, 0) * row_cost(t) + (end - begin) * bag_cost;
}

int64_t most_bags(const PoolingRequest& r) {
  int64_t bags = 0;
  for (const PooledTable* t = r.tables; t != r.end(); ++t)
    bags = std::max(bags, t[1].first_bag - t->first_bag);
  return bags;
}

// Cost of all bags before a block.
int64_t cost_before(const PoolingRequest& r, int64_t block) {
  int64_t total = 0;
  for (const PooledTable* t = r.tables; t != r.end(); ++t)
    total += cost(r.bags, *t, t->first_bag, r.block_begin(*t, block));
  return total;
}

// The cut before which lies a cost of about `target`.
Cut cut(const PoolingRequest& r, int64_t target) {
  int64_t block = 0, last = most_bags(r) / r.block_bags;
  while (block < last) {
    const int64_t middle = (block + last + 1) / 2;
    if (cost_before(r, middle) <= target)
      block = middle;
    else
      last = middle - 1;
  }
  target -= cost_before(r, block);
  for (const PooledTable* t = r.tables; t != r.end(); ++t) {
    const int64_t begin = r.block_begin(*t, block), end = r.block_begin(*t, block + 1);
    const int64_t all = cost(r.bags, *t, begin, end);
    if (target < all) {
      int64_t low = begin, high = end;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (cost(r.bags, *t, begin, middle) < target)
          low = middle + 1;
        else
          high = middle;
      }
      return {block, t - r.tables, low};
    }
    target -= all;
  }
  return {block + 1, 0, 0};
}

// Floats of scratch that a kernel needs to pool in float32 what it stores in 16 bits.
int64_t scratch_size(const PoolingRequest& r) {
  int64_t size = 0;
  for (const PooledTable* t = r.tables; t != r.end(); ++t)
    if (t->out_format != Format::f32) size = std::max(size, t->dim);
  return size;
}

}  // namespace

int64_t embedding_bag_cost(const PoolingRequest& r) {
  int64_t total = 0;
  for (const PooledTable* t = r.tables; t != r.end(); ++t)
    total += cost(r.bags, *t, t->first_bag, t[1].first_bag);
  return total;
}

void embedding_bag_forward(const PoolingRequest& request, int threads) {
  PoolingRequest r = request;
  const auto forward = kernels().embedding_bag->forward;
  const Bags& bags = r.bags;
  const int64_t num_bags = bags.num_bags();
  bool valid = bags.bag_begin(num_bags) == bags.indices.size &&
               (num_bags ? bags.bag_begin(0) : bags.indices.size) == 0;
  if (valid) {
    const int64_t total = threads > 1 ? embedding_bag_cost(r) : 0;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total / lines_per_thread));
    const int64_t scratch = scratch_size(r);
    const auto buffer = scratch ? std::make_unique<float[]>(scratch * parts) : nullptr;
    // One block of samples for each thread: all get their share of the tables that are out of cache. Smaller
    // ones would only drive page-table entries and hot rows out of the caches at each change of tables.
    r.block_bags = std::max<int64_t>(1, (most_bags(r) + parts - 1) / parts);
    const Cut start{0, 0, 0}, finish{most_bags(r) / r.block_bags + 1, 0, 0};
    if (parts == 1) {
      valid = forward(r, start, finish, buffer.get());
    } else {
      const auto part_begin = [&](int64_t part) {
        if (part == 0) return start;
        if (part == parts) return finish;
        return cut(r, static_cast<int64_t>(static_cast<double>(total) * part / parts));
      };
      std::atomic<bool> all_valid{true};
      parallel_ranges(parts, static_cast<int>(parts), [&](int64_t first, int64_t last) {
        if (!forward(r, part_begin(first), part_begin(last), buffer.get() + first * scratch))
          all_valid = false;
      });
      valid = all_valid;
    }
  }
  if (valid) return;
  Bounds bounds;
  for (int64_t f = 0; f < bags.num_features; ++f) bounds.emplace_back(f, r.tables[f].num_rows);
  throw_first_error(bags, bounds);
}

}  // namespace mprec
