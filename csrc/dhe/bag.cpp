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
void plan_features(const DheRequest& r, const DheFeature* features, Dedupe dedupe, const int64_t* ids,
                   KeptActivations* kept, Workspace& w) {
  const Bags& b = r.bags;
  const int64_t n = b.indices.size;
  const bool maps = kept || dedupe == Dedupe::always ||
                    (dedupe == Dedupe::automatic && n >= fewest_to_dedupe) || b.padding_idx >= 0;
  w.features.resize(b.num_features);
  w.pools.resize(b.num_features);
  if (maps) {
    w.distinct.resize(n);
    w.row_of_entry.resize(n);
  }
  int64_t floats = 0;
  for (int64_t t = 0; t < b.num_features; ++t) {
    DecodeWork& f = w.features[t];
    PoolArguments& pool = w.pools[t];
    const int64_t dim = features[t].decoder.dim, begin = b.feature_begin(t), end = b.feature_begin(t + 1);
    f = {features[t].decoder, ids + begin, end - begin, nullptr, dim, nullptr, 0};
    pool = {nullptr, dim, nullptr, nullptr, b.mode};
    if (maps) {
      int64_t* distinct = w.distinct.data() + begin;
      int32_t* rows = w.row_of_entry.data() + begin;
      const int64_t count =
          find_distinct(f.count, b.padding_idx, [&](int64_t i) { return f.ids[i]; }, distinct, rows);
      if (count < f.count) {  // else every ID is computed for its only entry
        f.ids = distinct;
        f.count = count;
        pool.row_of_entry = rows;
      }
      if (kept) {
        KeptActivations& k = kept[t];
        f.kept = k.floats;
        f.kept_stride = (end - begin) * block_pitch;
        k.count = count;
        std::copy_n(distinct, count, k.ids);
        std::copy_n(rows, end - begin, k.row_of_entry);
      }
    }
    if (b.per_sample_weights) pool.weights = b.per_sample_weights + begin;
    if (!pool.row_of_entry && !pool.weights && one_id_per_bag(b, t)) {
      f.vectors = r.out + features[t].column;
      f.stride = r.out_stride;
    } else {
      floats += f.count * dim;
    }
  }
  float* vectors = w.vectors.reserve(floats + 1);
  for (int64_t t = 0; t < b.num_features; ++t) {
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
  const int64_t* ids = f.ids + b.begin;
  float* vectors = f.vectors + b.begin * f.stride;
  const int count = static_cast<int>(b.count);
  if (!f.kept) return kernels().dhe->forward(f.decoder, ids, count, vectors, f.stride, scratch);
  float* kept = f.kept + b.begin * block_pitch;
  kernels().dhe->keep(f.decoder, ids, count, kept, f.kept_stride, scratch);
  const int dim = f.decoder.dim;
  const float* last = kept + (kept_blocks(f.decoder) - blocks_of(dim)) * f.kept_stride;  // values
  for (int64_t i = 0; i < count; ++i)
    for (int c = 0; c < dim; c += block_columns)
      std::copy_n(last + c / block_columns * f.kept_stride + i * block_pitch,
                  std::min(dim - c, block_columns), vectors + i * f.stride + c);
}

bool one_id_per_bag(const Bags& b, int64_t feature) {
  const int64_t first = b.first_bag(feature), begin = b.bag_begin(first);
  for (int64_t bag = first; bag <= b.first_bag(feature + 1); ++bag)
    if (b.bag_begin(bag) != begin + bag - first) return false;
  return true;
}

void dhe_decode(const std::vector<DecodeWork>& features, int threads) {
  Workspace& w = own_workspace;
  const Team team = plan_team(features, threads, w);
  parallel_parts(static_cast<int64_t>(w.blocks.size()), team.threads, [&](int64_t i, int slot) {
    decode_block(features, w.blocks[i], w.scratch.data() + slot * team.scratch);
  });
}

void dhe_bag_forward(const DheRequest& r, const DheFeature* features, Dedupe dedupe, int threads,
                     KeptActivations* kept) {
  Workspace& w = own_workspace;  // the same object in every thread
  const Bags& b = r.bags;
  check_offsets(b);
  plan_features(r, features, dedupe, checked_ids(b, r.largest_id, w.ids), kept, w);
  const Team team = plan_team(w.features, threads, w);

  const auto pool = [&](int64_t bag) {
    const int64_t t = bag / b.batch;
    if (!w.pools[t].vectors) return;
    const int64_t begin = b.feature_begin(t);
    kernels().dhe->pool(w.pools[t], b.bag_begin(bag) - begin, b.bag_begin(bag + 1) - begin,
                        r.out + bag % b.batch * r.out_stride + features[t].column);
  };
  parallel_parts(static_cast<int64_t>(w.blocks.size()), team.threads, [&](int64_t i, int slot) {
    decode_block(w.features, w.blocks[i], w.scratch.data() + slot * team.scratch);
  });
  parallel_ranges(b.num_bags(), team.threads, [&](int64_t begin, int64_t end) {
    for (int64_t bag = begin; bag < end; ++bag) pool(bag);
  });
}

}  // namespace mprec
