#include "embedding_bag/embedding_bag.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "bags/check.h"
#include "common/parallel.h"
#include "registry.h"

namespace mprec {
namespace {

// Work that repays waking a thread, in cache lines touched.
constexpr int64_t lines_per_thread = 1024;
// A bag's own cost (offsets, the store of its result) against a row's cache lines.
constexpr int64_t bag_cost = 2;

int64_t clamped_begin(const BagRequest& r, int64_t bag) {
  return std::clamp<int64_t>(r.bag_begin(bag), 0, r.indices.size);
}

int64_t row_cost(const Feature& f) { return row_size(f.format, f.dim) / 64 + 1; }

// Cost of a feature's bags [begin, end).
int64_t cost(const BagRequest& r, const Feature& f, int64_t begin, int64_t end) {
  const int64_t indices = clamped_begin(r, end) - clamped_begin(r, begin);
  return std::max<int64_t>(indices, 0) * row_cost(f) + (end - begin) * bag_cost;
}

int64_t most_bags(const BagRequest& r) {
  int64_t bags = 0;
  for (const Feature* f = r.features; f != r.features + r.num_features; ++f)
    bags = std::max(bags, f[1].first_bag - f->first_bag);
  return bags;
}

// Cost of all bags before a block.
int64_t cost_before(const BagRequest& r, int64_t block) {
  int64_t total = 0;
  for (const Feature* f = r.features; f != r.features + r.num_features; ++f)
    total += cost(r, *f, f->first_bag, r.block_begin(*f, block));
  return total;
}

// The cut before which lies a cost of about `target`.
Cut cut(const BagRequest& r, int64_t target) {
  int64_t block = 0, last = most_bags(r) / r.block_bags;
  while (block < last) {
    const int64_t middle = (block + last + 1) / 2;
    if (cost_before(r, middle) <= target)
      block = middle;
    else
      last = middle - 1;
  }
  target -= cost_before(r, block);
  for (int64_t t = 0; t < r.num_features; ++t) {
    const Feature& f = r.features[t];
    const int64_t begin = r.block_begin(f, block), end = r.block_begin(f, block + 1);
    const int64_t all = cost(r, f, begin, end);
    if (target < all) {
      int64_t low = begin, high = end;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (cost(r, f, begin, middle) < target)
          low = middle + 1;
        else
          high = middle;
      }
      return {block, t, low};
    }
    target -= all;
  }
  return {block + 1, 0, 0};
}

// Floats of scratch that a kernel needs to pool in float32 what it stores in 16 bits.
int64_t scratch_size(const BagRequest& r) {
  int64_t size = 0;
  for (const Feature* f = r.features; f != r.features + r.num_features; ++f)
    if (f->out_format != Format::f32) size = std::max(size, f->dim);
  return size;
}

}  // namespace

void throw_first_error(const BagRequest& r) {
  BagLayout layout{r.num_features, 0};
  std::vector<std::pair<int64_t, int64_t>> bounds;
  for (int64_t t = 0; t <= r.num_features; ++t) {
    layout.first_bags.push_back(r.features[t].first_bag);
    if (t < r.num_features) bounds.emplace_back(t, r.features[t].num_rows);
  }
  check_offsets(r.offsets, r.indices.size, layout);
  check_ids(r.indices, r.offsets, layout, bounds);
  throw std::runtime_error("indices or offsets were changed by another thread during the call");
}

int64_t embedding_bag_cost(const BagRequest& r) {
  int64_t total = 0;
  for (const Feature* f = r.features; f != r.features + r.num_features; ++f)
    total += cost(r, *f, f->first_bag, f[1].first_bag);
  return total;
}

void embedding_bag_forward(const BagRequest& request, int threads) {
  BagRequest r = request;
  const auto forward = kernels().embedding_bag->forward;
  bool valid = r.bag_begin(r.num_bags) == r.indices.size && (r.num_bags == 0 || r.bag_begin(0) == 0);
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
  if (!valid) throw_first_error(r);
}

}  // namespace mprec
