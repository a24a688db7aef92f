#include "program/program.h"

#include <algorithm>
#include <atomic>

#include "bags/check.h"
#include "common/aligned.h"
#include "common/distinct.h"
#include "common/error.h"
#include "common/parallel.h"
#include "dhe/bag.h"
#include "dhe/pack.h"
#include "embedding_bag/embedding_bag.h"
#include "program/halves.h"
#include "program/unseen.h"
#include "registry.h"

namespace mprec {
namespace {

// Work that repays waking a thread: some 20 microseconds.
constexpr int64_t multiply_adds_per_thread = 1 << 21;

void check_bags(const Bags& b, int64_t num_features) {
  if (b.num_features != num_features || b.offsets.size != b.num_bags() + 1)
    throw OffsetsError(message("offsets: expected ", num_features * b.batch + 1, " for ", num_features,
                               " features of ", b.batch, " samples, got ", b.offsets.size));
  check_offsets(b);
}

int64_t codes_of(const TableStage& stage) { return stage.projection ? stage.projection->rank : 0; }

}  // namespace

// Offsets into one thread's scratch, in floats.
struct Program::Layout {
  int64_t activations;  // of each of two
  int64_t vectors, parts, rests, codes, ones, transposed, decoding, total;
  int64_t vectors_stride, parts_stride;  // from sample to sample
};

// Samples of a batch that a thread scores at once, and where it keeps what it pools for them.
struct Program::Block {
  int64_t begin;
  int samples, thread;
  float *parts, *rests, *codes, *ones;  // rests: vectors of the halves that have no hot rows
  int64_t parts_stride, rests_stride;

  template <class Stage>
  float* vector(const Stage& stage, int dim) const {
    return (stage.bags == BagsOf::rest ? rests : parts) + stage.part * dim;
  }
  template <class Stage>
  int64_t stride(const Stage& stage) const {
    return stage.bags == BagsOf::rest ? rests_stride : parts_stride;
  }
};

// What a call needs beside its arguments; kept by each calling thread.
struct Program::Workspace {
  Bags bags[kinds_of_bags];
  const Bags& of(BagsOf kind) const { return bags[static_cast<int>(kind)]; }
  Bags& of(BagsOf kind) { return bags[static_cast<int>(kind)]; }

  Unseen unseen;
  Halves halves;
  AlignedBuffer<float> scratch, decoded, cached;
  std::vector<PooledTable> tables;  // of all threads
  std::vector<int64_t> ids, distinct;
  std::vector<int32_t> row_of_entry;
  std::vector<DecodeWork> work;
  std::vector<PoolArguments> pools;
  std::vector<DecodeBlock> blocks;
};

Program::Layout Program::layout() const {
  const auto& p = parts_;
  const int widest = std::max({p.top->view().widest, p.bottom ? p.bottom->view().widest : 0, p.dim});
  Layout l{};
  l.activations = blocks_of(widest) * sample_block_stride + 16;  // a kernel stores whole registers
  l.vectors_stride = int64_t{interaction_.vectors} * p.dim;
  l.parts_stride = num_parts_ * p.dim;
  l.vectors = 2 * l.activations;
  l.parts = l.vectors + round_up(max_samples * l.vectors_stride + 16, 16);
  l.rests = l.parts + (p.mixing.empty() ? 0 : round_up(max_samples * l.parts_stride + 16, 16));
  const auto rests = static_cast<int64_t>(p.hot.size());
  l.codes = l.rests + (rests ? round_up(max_samples * rests * p.dim + 16, 16) : 0);
  l.ones = l.codes + (num_codes_ ? round_up(max_samples * num_codes_ + 16, 16) : 0);
  l.transposed = l.ones + (num_codes_ ? round_up(max_samples, 16) : 0);
  l.decoding = l.transposed + round_up(interaction_.transposed_floats() + 16, 16);
  int64_t decoding = 0;
  for (const DecoderStage& stage : p.decoders) decoding = std::max(decoding, scratch_floats(stage.decoder));
  l.total = l.decoding + round_up(decoding, 16);
  return l;
}

// Which IDs of the whole batch are decoded: equal ones of a feature once.
void Program::plan_decoding(int64_t samples, int threads, Workspace& w) const {
  const auto& stages = parts_.decoders;
  w.work.resize(stages.size());
  w.pools.resize(stages.size());
  const auto begin_of = [&](const DecoderStage& s) {
    const Bags& b = w.of(s.bags);
    return b.bag_begin(b.first_bag(s.feature));
  };
  const auto count_of = [&](const DecoderStage& s) {
    const Bags& b = w.of(s.bags);
    return b.bag_begin(b.first_bag(s.feature) + samples) - begin_of(s);
  };
  int64_t entries = 0;
  for (const DecoderStage& s : stages) entries += count_of(s);
  w.distinct.resize(entries);
  w.row_of_entry.resize(entries);
  const bool whole = stages.front().bags == BagsOf::batch;  // these come first
  const int64_t* const checked = whole ? checked_ids(w.of(BagsOf::batch), INT64_MAX, w.ids) : nullptr;
  int64_t place = 0, floats = 0;
  for (size_t t = 0; t < stages.size(); ++t) {
    const int64_t count = count_of(stages[t]);
    const int64_t* const ids = stages[t].bags == BagsOf::batch
                                   ? checked
                                   : static_cast<const int64_t*>(w.of(stages[t].bags).indices.data);
    const int64_t* const own = ids + begin_of(stages[t]);
    int64_t* const distinct = w.distinct.data() + place;
    int32_t* const rows = w.row_of_entry.data() + place;
    const int64_t found = find_distinct(count, -1, [&](int64_t i) { return own[i]; }, distinct, rows);
    w.work[t] = {stages[t].decoder, distinct, found, nullptr, parts_.dim};
    w.pools[t] = {nullptr, parts_.dim, found < count ? rows : nullptr, nullptr, stages[t].mode};
    place += count;
    floats += found * parts_.dim;
  }
  float* vectors = w.decoded.reserve(floats + 1);
  for (size_t t = 0; t < stages.size(); ++t) {
    w.pools[t].vectors = w.work[t].vectors = vectors;
    vectors += w.work[t].count * parts_.dim;
  }
  plan_decode_blocks(w.work, threads, w.blocks);
}

// The pooled vectors of all decoders behind caches, of the whole batch.
void Program::run_cached(const Bags& b, int threads, Workspace& w) const {
  float* const out = w.cached.reserve(b.batch * cached_floats_ + 1);
  for (const CachedStage& stage : parts_.cached) {
    DheRequest request{b, out, cached_floats_};
    request.bags.mode = stage.mode;
    cached_dhe_bag_forward(request, stage.features, stage.admit, threads, *stage.counters);
  }
}

// False if a table has no such ID.
bool Program::pool_tables(const Block& block, Workspace& w) const {
  PooledTable* table = w.tables.data() + block.thread * (parts_.tables.size() + runs_.size());
  int64_t code = 0;
  for (const TableRun& run : runs_) {
    const Bags& b = w.of(run.bags);
    PoolingRequest r{b, table, block.samples};
    r.bags.num_features = static_cast<int64_t>(run.count);
    r.bags.mode = run.mode;
    for (size_t i = run.first; i < run.first + run.count; ++i) {
      const TableStage& t = parts_.tables[i];
      *table++ = {t.rows,
                  t.num_rows,
                  t.projection ? t.projection->rank : t.vectors * parts_.dim,
                  t.row_bytes,
                  b.first_bag(t.feature) + block.begin,
                  t.projection ? block.codes + code : block.vector(t, parts_.dim),
                  t.projection ? num_codes_ : block.stride(t),
                  t.format};
      code += codes_of(t);
    }
    // The bags between this and the next feature's first are as many as the batch has; a block is `samples`.
    table->first_bag = table[-1].first_bag + b.batch;
    ++table;
    if (!kernels().embedding_bag->forward(r, {0, 0, 0}, {1, 0, 0}, nullptr)) return false;
  }
  return true;
}

// Vectors of the tables with projections from their pooled codes.
void Program::project(const Block& block, const Workspace& w) const {
  const float* codes = block.codes;
  for (const TableStage& t : parts_.tables) {
    if (!t.projection) continue;
    const Projection& p = *t.projection;
    const Bags& b = w.of(t.bags);
    const int64_t first = b.first_bag(t.feature) + block.begin;
    for (int s = 0; s < block.samples && !p.bias.empty(); ++s) {
      const int64_t rows = b.bag_begin(first + s + 1) - b.bag_begin(first + s);
      block.ones[s] = static_cast<float>(t.mode == Mode::mean ? std::min<int64_t>(rows, 1) : rows);
    }
    kernels().dense->project({p.rank, parts_.dim, p.matrix.data(), p.bias.empty() ? nullptr : p.bias.data()},
                             codes, num_codes_, block.ones, block.samples, block.vector(t, parts_.dim),
                             block.stride(t));
    codes += p.rank;
  }
}

// Vectors that were decoded, or pooled already; the sums of halves; what unseen IDs give.
void Program::pool_vectors(const Block& block, const Workspace& w) const {
  const auto& p = parts_;
  const auto pool = kernels().dhe->pool;
  for (size_t t = 0; t < p.decoders.size(); ++t) {
    const DecoderStage& stage = p.decoders[t];
    const Bags& b = w.of(stage.bags);
    const int64_t first = b.first_bag(stage.feature), start = b.bag_begin(first);
    for (int s = 0; s < block.samples; ++s)
      pool(w.pools[t], b.bag_begin(first + block.begin + s) - start,
           b.bag_begin(first + block.begin + s + 1) - start,
           block.vector(stage, p.dim) + s * block.stride(stage));
  }
  for (const CachedStage& stage : p.cached)
    for (size_t i = 0; i < stage.features.size(); ++i)
      for (int s = 0; s < block.samples; ++s)
        std::copy_n(w.cached.data() + (block.begin + s) * cached_floats_ + stage.features[i].column, p.dim,
                    block.parts + s * block.parts_stride + stage.parts[i] * p.dim);
  for (size_t h = 0; h < p.hot.size(); ++h)
    add_halves(p.hot[h], w.of(BagsOf::batch), block.begin, block.samples, p.dim,
               block.rests + static_cast<int64_t>(h) * p.dim, block.rests_stride,
               block.parts + p.hot[h].part * p.dim, block.parts_stride);
  for (size_t u = 0; u < p.unseen.size(); ++u)
    w.unseen.add(p.unseen[u], u, block.begin, block.samples, p.dim, block.parts, block.parts_stride);
}

// Samples whose IDs are decoded; false if a table has no such ID.
bool Program::score_block(const Batch& batch, int64_t begin, int samples, const Layout& l, Workspace& w,
                          int thread, bool backwards, float* scores) const {
  const Kernels& k = kernels();
  const auto& p = parts_;
  float* const scratch = w.scratch.data() + thread * l.total;
  float *in = scratch, *spare = scratch + l.activations, *vectors = scratch + l.vectors;
  const bool mixed = !p.mixing.empty();
  const Block block{begin,
                    samples,
                    thread,
                    mixed ? scratch + l.parts : vectors + p.dim,
                    scratch + l.rests,
                    scratch + l.codes,
                    scratch + l.ones,
                    mixed ? l.parts_stride : l.vectors_stride,
                    static_cast<int64_t>(p.hot.size()) * p.dim};
  if (!pool_tables(block, w)) return false;
  if (num_codes_) project(block, w);
  pool_vectors(block, w);
  if (mixed)
    k.dense->mix(p.mixing.data(), static_cast<int64_t>(p.mixing.size()), p.dim, block.parts,
                 block.parts_stride, samples, vectors, l.vectors_stride);

  if (p.bottom) {
    k.dense->gather(batch.dense + begin * batch.dense_stride, batch.dense_stride, samples, p.num_dense, in,
                    sample_block_stride, 0);
    const float* out = k.dense->mlp(p.bottom->view(), samples, backwards, in, spare, sample_block_stride);
    k.dense->scatter(out, sample_block_stride, samples, p.dim, vectors, l.vectors_stride);
  } else {
    for (int s = 0; s < samples; ++s)
      std::copy(p.constant.begin(), p.constant.end(), vectors + s * l.vectors_stride);
  }
  const bool dot = p.interaction == Interaction::dot;
  k.dense->gather(vectors, l.vectors_stride, samples, dot ? p.dim : interaction_.vectors * p.dim, in,
                  sample_block_stride, 0);
  if (dot)
    k.dense->interact(interaction_, vectors, l.vectors_stride, samples, scratch + l.transposed, in,
                      sample_block_stride, p.dim);
  const float* out = k.dense->mlp(p.top->view(), samples, backwards, in, spare, sample_block_stride);
  for (int s = 0; s < samples; ++s) scores[begin + s] = out[s * block_pitch];
  return true;
}

void Program::throw_first_bad_id(const Bags& b) const {
  Bounds bounds;
  for (const TableStage& t : parts_.tables)
    if (t.bags == BagsOf::batch) bounds.emplace_back(t.feature, t.num_rows);
  for (const HotStage& t : parts_.hot) bounds.emplace_back(t.feature, t.ids.num_ids());
  throw_first_error(b, bounds);
}

void Program::run(const Batch& batch, float* scores, int threads) const {
  Bags b = batch.bags;
  const int64_t samples = b.batch;
  check_bags(b, parts_.num_features);
  static thread_local Workspace own_workspace;
  Workspace& w = own_workspace;  // the same object in every thread
  if (!parts_.unseen.empty()) {
    w.unseen.replace(parts_.unseen, b, threads);
    b = w.unseen.bags();
  }
  w.of(BagsOf::batch) = b;
  if (!parts_.hot.empty()) {
    if (!w.halves.divide(parts_.hot, b, threads)) throw_first_bad_id(b);
    w.of(BagsOf::hot) = w.halves.hot();
    w.of(BagsOf::rest) = w.halves.rest();
  }
  if (!parts_.cached.empty()) run_cached(b, threads, w);
  if (samples == 0) return;
  static thread_local bool forwards;
  const bool backwards = forwards = !forwards;

  int64_t multiply_adds = multiply_adds_ * samples;
  if (!parts_.decoders.empty()) {
    plan_decoding(samples, threads, w);
    for (const DecodeWork& work : w.work) multiply_adds += work.count * work.decoder.multiply_adds();
  }
  threads = static_cast<int>(std::clamp<int64_t>(multiply_adds / multiply_adds_per_thread, 1, threads));
  const Layout l = layout();
  w.scratch.reserve(l.total * threads);
  w.tables.resize((parts_.tables.size() + runs_.size()) * threads);

  const int64_t rounds = (samples + threads * max_samples - 1) / (threads * max_samples);
  const int64_t blocks = std::min(samples, rounds * threads);
  const int64_t decode_blocks = parts_.decoders.empty() ? 0 : static_cast<int64_t>(w.blocks.size());
  parallel_parts(decode_blocks, threads, [&](int64_t i, int thread) {
    decode_block(w.work, w.blocks[i], w.scratch.data() + thread * l.total + l.decoding);
  });
  std::atomic<bool> valid{true};
  parallel_parts(blocks, threads, [&](int64_t i, int thread) {
    const int64_t begin = samples * i / blocks, end = samples * (i + 1) / blocks;
    if (valid.load(std::memory_order_relaxed) &&
        !score_block(batch, begin, static_cast<int>(end - begin), l, w, thread, backwards, scores))
      valid = false;
  });
  if (!valid) throw_first_bad_id(b);
}

}  // namespace mprec
