#include "dhe/bag.h"

#include <algorithm>
#include <vector>

#include "bags/check.h"
#include "common/aligned.h"
#include "common/distinct.h"
#include "common/parallel.h"
#include "registry.h"

namespace mprec {
namespace {

// Work that repays waking a thread: some 20 microseconds.
constexpr int64_t multiply_adds_per_thread = 1 << 21;
// Fewer IDs than this cannot repay looking for equal ones.
constexpr int64_t fewest_to_dedupe = 8;

// What a call needs beside its arguments; kept by each calling thread, so that calls do not allocate.
struct Workspace {
  std::vector<int64_t> ids, distinct;
  std::vector<int32_t> row_of_entry;
  std::vector<DecodeWork> features;
  std::vector<PoolArguments> pools;  // vectors is null where every vector already went to its place in `out`
  std::vector<DecodeBlock> blocks;
  AlignedBuffer<float> vectors, scratch;
};

thread_local Workspace own_workspace;

// Which IDs of each feature are computed, and where to.
void plan_features(const DheBagRequest& r, const int64_t* ids, Workspace& w) {
  const int64_t n = r.indices.size;
  const bool dedupe = r.dedupe == Dedupe::always || (r.dedupe == Dedupe::automatic && n >= fewest_to_dedupe);
  w.features.resize(r.num_features);
  w.pools.resize(r.num_features);
  if (dedupe || r.padding_idx >= 0) {
    w.distinct.resize(n);
    w.row_of_entry.resize(n);
  }
  int64_t floats = 0;
  for (int64_t t = 0; t < r.num_features; ++t) {
    DecodeWork& f = w.features[t];
    PoolArguments& pool = w.pools[t];
    const int64_t dim = r.decoders[t].dim, begin = r.bag_begin(t * r.bags),
                  end = r.bag_begin((t + 1) * r.bags);
    f = {r.decoders[t], ids + begin, end - begin, nullptr, dim};
    pool = {nullptr, dim, nullptr, nullptr, r.mode};
    if (dedupe || r.padding_idx >= 0) {
      int64_t* distinct = w.distinct.data() + begin;
      int32_t* rows = w.row_of_entry.data() + begin;
      const int64_t count =
          find_distinct(f.count, r.padding_idx, [&](int64_t i) { return f.ids[i]; }, distinct, rows);
      if (count < f.count) {  // else every ID is computed for its only entry
        f.ids = distinct;
        f.count = count;
        pool.row_of_entry = rows;
      }
    }
    if (r.per_sample_weights) pool.weights = r.per_sample_weights + begin;
    if (!pool.row_of_entry && !pool.weights && r.one_id_per_bag(t)) {
      f.vectors = r.out + r.columns[t];
      f.stride = r.out_stride;
    } else {
      floats += f.count * dim;
    }
  }
  float* vectors = w.vectors.reserve(floats + 1);
  for (int64_t t = 0; t < r.num_features; ++t) {
    DecodeWork& f = w.features[t];
    if (f.vectors) continue;
    w.pools[t].vectors = f.vectors = vectors;
    vectors += f.count * f.stride;
  }
}

// How many of `threads` repay waking them for this work; plans w.blocks and w.scratch for so many.
struct Team {
  int threads;
  int64_t scratch;  // floats of w.scratch for each
};

Team plan_team(const std::vector<DecodeWork>& features, int threads, Workspace& w) {
  int64_t multiply_adds = 0, scratch = 0;
  for (const DecodeWork& f : features) {
    multiply_adds += f.count * f.decoder.multiply_adds();
    scratch = std::max(scratch, scratch_floats(f.decoder));
  }
  threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(threads, multiply_adds / multiply_adds_per_thread)));
  plan_decode_blocks(features, threads, w.blocks);
  w.scratch.reserve(scratch * threads);
  return {threads, scratch};
}

}  // namespace

void plan_decode_blocks(const std::vector<DecodeWork>& features, int threads,
                        std::vector<DecodeBlock>& blocks) {
  blocks.clear();
  int64_t total = 0;
  for (const DecodeWork& f : features) total += f.count;
  if (total == 0) return;
  const int64_t rounds = (total + threads * max_ids - 1) / (threads * max_ids);
  const int64_t largest = std::min<int64_t>(max_ids, (total + threads * rounds - 1) / (threads * rounds));
  for (size_t t = 0; t < features.size(); ++t) {
    const int64_t n = features[t].count, parts = (n + largest - 1) / largest;
    for (int64_t i = 0; i < parts; ++i)
      blocks.push_back({static_cast<int64_t>(t), n * i / parts, n * (i + 1) / parts - n * i / parts});
  }
}

void decode_block(const std::vector<DecodeWork>& features, const DecodeBlock& b, float* scratch) {
  const DecodeWork& f = features[b.feature];
  kernels().dhe->forward(f.decoder, f.ids + b.begin, static_cast<int>(b.count),
                         f.vectors + b.begin * f.stride, f.stride, scratch);
}

void check_offsets(const DheBagRequest& r) {
  const int64_t total = r.num_features * r.bags, n = r.indices.size;
  bool valid = r.bag_begin(0) == 0 && r.bag_begin(total) == n;
  for (int64_t b = 0; b < total; ++b) valid &= r.bag_begin(b) <= r.bag_begin(b + 1);
  if (!valid) check_offsets(r.offsets, n, BagLayout{r.num_features, r.bags});
}

const int64_t* checked_ids(const DheBagRequest& r, std::vector<int64_t>& storage) {
  const int64_t* ids = static_cast<const int64_t*>(r.indices.data);
  if (!r.indices.wide) {
    storage.resize(r.indices.size);
    for (int64_t i = 0; i < r.indices.size; ++i) storage[i] = r.indices[i];
    ids = storage.data();
  }
  uint64_t signs = 0;  // the highest bit: of any ID, or of any difference to the largest allowed
  for (int64_t i = 0; i < r.indices.size; ++i) {
    const uint64_t id = static_cast<uint64_t>(ids[i]);
    signs |= id | (static_cast<uint64_t>(r.largest_id) - id);
  }
  if (static_cast<int64_t>(signs) < 0) {
    std::vector<std::pair<int64_t, int64_t>> bounds;
    for (int64_t t = 0; t < r.num_features; ++t)
      bounds.emplace_back(t, r.largest_id == INT64_MAX ? -1 : r.largest_id + 1);
    check_ids(r.indices, r.offsets, BagLayout{r.num_features, r.bags}, bounds);
  }
  return ids;
}

bool DheBagRequest::one_id_per_bag(int64_t t) const {
  for (int64_t b = t * bags; b <= (t + 1) * bags; ++b)
    if (bag_begin(b) != bag_begin(t * bags) + b - t * bags) return false;
  return true;
}

void dhe_decode(const std::vector<DecodeWork>& features, int threads) {
  Workspace& w = own_workspace;
  const Team team = plan_team(features, threads, w);
  parallel_parts(static_cast<int64_t>(w.blocks.size()), team.threads, [&](int64_t i, int slot) {
    decode_block(features, w.blocks[i], w.scratch.data() + slot * team.scratch);
  });
}

void dhe_bag_forward(const DheBagRequest& r, int threads) {
  Workspace& w = own_workspace;  // the same object in every thread
  check_offsets(r);
  plan_features(r, checked_ids(r, w.ids), w);
  const Team team = plan_team(w.features, threads, w);

  const auto pool = [&](int64_t bag) {
    const int64_t t = bag / r.bags;
    if (!w.pools[t].vectors) return;
    const int64_t begin = r.bag_begin(t * r.bags);
    kernels().dhe->pool(w.pools[t], r.bag_begin(bag) - begin, r.bag_begin(bag + 1) - begin,
                        r.out + bag % r.bags * r.out_stride + r.columns[t]);
  };
  parallel_parts(static_cast<int64_t>(w.blocks.size()), team.threads, [&](int64_t i, int slot) {
    decode_block(w.features, w.blocks[i], w.scratch.data() + slot * team.scratch);
  });
  parallel_ranges(r.num_features * r.bags, team.threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) pool(b);
  });
}

}  // namespace mprec
