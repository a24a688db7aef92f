#include "program/program.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "bags/check.h"
#include "common/aligned.h"
#include "common/distinct.h"
#include "common/error.h"
#include "common/parallel.h"
#include "dhe/bag.h"
#include "dhe/pack.h"
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

void check_projection(const TableStage& stage, int dim) {
  if (!stage.projection) return;
  const Projection& p = *stage.projection;
  if (p.rank < 1 || p.rank > 4096) throw std::invalid_argument(message("projections: rank ", p.rank));
  if (stage.vectors != 1 || stage.mode == Mode::max)
    throw std::invalid_argument("projections: expected rows of one vector, pooled by sum or mean");
  if (p.matrix.size() != static_cast<size_t>(p.rank) * dim ||
      (!p.bias.empty() && p.bias.size() != static_cast<size_t>(dim)))
    throw std::invalid_argument(
        message("projections: expected a matrix [", p.rank, ", ", dim, "] and a bias [", dim, "]"));
}

int vectors_of(const TableStage& stage) { return stage.vectors; }
int vectors_of(const DecoderStage&) { return 1; }

template <class Stages>
void check_stages(const Stages& stages, int64_t num_features, std::vector<bool>& filled) {
  for (const auto& stage : stages) {
    if (stage.feature < 0 || stage.feature >= num_features)
      throw std::invalid_argument(
          message("stages: feature ", stage.feature, " is none of the ", num_features));
    for (int64_t part = stage.part; part < stage.part + vectors_of(stage); ++part) {
      if (part < 0 || part >= static_cast<int64_t>(filled.size()) || filled[part])
        throw std::invalid_argument(
            message("stages: expected each part below ", filled.size(), " once, got ", part));
      filled[part] = true;
    }
  }
}

}  // namespace

// Offsets into one thread's scratch, in floats.
struct Program::Layout {
  int64_t activations;  // of each of two
  int64_t vectors, parts, codes, ones, transposed, decoding, total;
  int64_t vectors_stride, parts_stride;  // from sample to sample
};

// What a call needs beside its arguments; kept by each calling thread.
struct Program::Workspace {
  AlignedBuffer<float> scratch, decoded;
  std::vector<PooledTable> tables;  // of all threads
  std::vector<int64_t> ids, distinct;
  std::vector<int32_t> row_of_entry;
  std::vector<DecodeWork> work;
  std::vector<PoolArguments> pools;
  std::vector<DecodeBlock> blocks;
};

Program::Program(Parts parts) : parts_(std::move(parts)) {
  const auto& p = parts_;
  if (p.num_features < 1) throw std::invalid_argument("num_features: expected at least 1");
  if (p.dim < 1) throw std::invalid_argument(message("dim: expected at least 1, got ", p.dim));
  num_parts_ = static_cast<int64_t>(p.decoders.size());
  for (const TableStage& stage : p.tables) {
    if (stage.vectors < 1 || stage.vectors > 4096)
      throw std::invalid_argument(message("tables: rows of ", stage.vectors, " vectors"));
    num_parts_ += stage.vectors;
    num_codes_ += codes_of(stage);
    check_projection(stage, p.dim);
  }
  if (num_parts_ > 4096) throw std::invalid_argument(message("stages: at most 4096 parts, got ", num_parts_));
  std::vector<bool> filled(num_parts_);
  check_stages(p.tables, p.num_features, filled);
  check_stages(p.decoders, p.num_features, filled);
  for (const DecoderStage& stage : p.decoders)
    if (stage.decoder.dim != p.dim)
      throw std::invalid_argument(
          message("decoders: expected vectors of ", p.dim, " numbers, got ", stage.decoder.dim));
  if (p.bottom ? p.bottom->inputs() != p.num_dense || p.bottom->outputs() != p.dim
               : p.num_dense != 0 || static_cast<int>(p.constant.size()) != p.dim)
    throw std::invalid_argument(message("bottom: expected layers from ", p.num_dense, " numbers to ", p.dim));

  int64_t vectors = 1 + num_parts_;
  if (!p.mixing.empty()) {
    int last = 0;
    for (const MixTerm& term : p.mixing) {
      if (term.vector != last && term.vector != last + 1)
        throw std::invalid_argument("mixing: expected terms of vectors 1, 2, and so on, in order");
      if (term.vector < 1 || term.part < 0 || term.part >= num_parts_)
        throw std::invalid_argument(message("mixing: vector ", term.vector, " of part ", term.part));
      last = term.vector;
    }
    vectors = 1 + last;
  }
  if (vectors > 4096)
    throw std::invalid_argument(message("stages: at most 4096 vectors interact, got ", vectors));
  interaction_ = {static_cast<int>(vectors), p.dim, false};
  const bool dot = p.interaction == Interaction::dot;
  const int64_t inputs = dot ? p.dim + interaction_.products() : vectors * p.dim;
  if (!p.top || p.top->inputs() != inputs || p.top->outputs() != 1)
    throw std::invalid_argument(message("top: expected layers from ", inputs, " numbers to 1"));

  for (size_t i = 0; i < p.tables.size(); ++i) {
    const TableStage& t = p.tables[i];
    const bool follows = i > 0 && t.feature == p.tables[i - 1].feature + 1;
    if (i > 0 && t.feature <= p.tables[i - 1].feature)
      throw std::invalid_argument("tables: expected features in order");
    if (follows && runs_.back().mode == t.mode)
      ++runs_.back().count;
    else
      runs_.push_back({i, 1, t.mode});
  }
  multiply_adds_ = p.top->view().multiply_adds() + (p.bottom ? p.bottom->view().multiply_adds() : 0) +
                   (dot ? interaction_.products() * p.dim : 0) + num_codes_ * p.dim;
}

int64_t Program::nbytes() const {
  return parts_.top->nbytes() + (parts_.bottom ? parts_.bottom->nbytes() : 0);
}

Program::Layout Program::layout() const {
  const auto& p = parts_;
  const int widest = std::max({p.top->view().widest, p.bottom ? p.bottom->view().widest : 0, p.dim});
  Layout l{};
  l.activations = blocks_of(widest) * sample_block_stride + 16;  // a kernel stores whole registers
  l.vectors_stride = int64_t{interaction_.vectors} * p.dim;
  l.parts_stride = num_parts_ * p.dim;
  l.vectors = 2 * l.activations;
  l.parts = l.vectors + round_up(max_samples * l.vectors_stride + 16, 16);
  l.codes = l.parts + (p.mixing.empty() ? 0 : round_up(max_samples * l.parts_stride + 16, 16));
  l.ones = l.codes + (num_codes_ ? round_up(max_samples * num_codes_ + 16, 16) : 0);
  l.transposed = l.ones + (num_codes_ ? round_up(max_samples, 16) : 0);
  l.decoding = l.transposed + round_up(interaction_.transposed_floats() + 16, 16);
  int64_t decoding = 0;
  for (const DecoderStage& stage : p.decoders) decoding = std::max(decoding, scratch_floats(stage.decoder));
  l.total = l.decoding + round_up(decoding, 16);
  return l;
}

// Which IDs of the whole batch are decoded: equal ones of a feature once.
void Program::plan_decoding(const Bags& b, int threads, Workspace& w) const {
  const auto& stages = parts_.decoders;
  w.work.resize(stages.size());
  w.pools.resize(stages.size());
  int64_t entries = 0;
  for (const DecoderStage& s : stages) entries += b.feature_begin(s.feature + 1) - b.feature_begin(s.feature);
  w.distinct.resize(entries);
  w.row_of_entry.resize(entries);
  const int64_t* ids = checked_ids(b, INT64_MAX, w.ids);
  int64_t place = 0, floats = 0;
  for (size_t t = 0; t < stages.size(); ++t) {
    const int64_t begin = b.feature_begin(stages[t].feature),
                  count = b.feature_begin(stages[t].feature + 1) - begin;
    int64_t* const distinct = w.distinct.data() + place;
    int32_t* const rows = w.row_of_entry.data() + place;
    const int64_t found = find_distinct(count, -1, [&](int64_t i) { return ids[begin + i]; }, distinct, rows);
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

// Vectors of the tables with projections from their pooled codes.
void Program::project(const Bags& b, int64_t begin, int samples, const float* codes, float* ones,
                      float* parts, int64_t parts_stride) const {
  for (const TableStage& t : parts_.tables) {
    if (!t.projection) continue;
    const Projection& p = *t.projection;
    const int64_t first = b.first_bag(t.feature) + begin;
    for (int s = 0; s < samples && !p.bias.empty(); ++s) {
      const int64_t rows = b.bag_begin(first + s + 1) - b.bag_begin(first + s);
      ones[s] = static_cast<float>(t.mode == Mode::mean ? std::min<int64_t>(rows, 1) : rows);
    }
    kernels().dense->project({p.rank, parts_.dim, p.matrix.data(), p.bias.empty() ? nullptr : p.bias.data()},
                             codes, num_codes_, ones, samples, parts + t.part * parts_.dim, parts_stride);
    codes += p.rank;
  }
}

// Samples [begin, begin + samples), whose IDs are decoded; false if a table has no such ID.
bool Program::score_block(const Batch& batch, int64_t begin, int samples, const Layout& l, Workspace& w,
                          int thread, bool backwards, float* scores) const {
  const Kernels& k = kernels();
  const Bags& b = batch.bags;
  const auto& p = parts_;
  float* const scratch = w.scratch.data() + thread * l.total;
  float *in = scratch, *spare = scratch + l.activations, *vectors = scratch + l.vectors;
  const bool mixed = !p.mixing.empty();
  float* const parts = mixed ? scratch + l.parts : vectors + p.dim;
  const int64_t parts_stride = mixed ? l.parts_stride : l.vectors_stride;

  PooledTable* table = w.tables.data() + thread * (p.tables.size() + runs_.size());
  float* const codes = scratch + l.codes;
  int64_t code = 0;
  for (const TableRun& run : runs_) {
    PoolingRequest r{b, table, samples};
    r.bags.num_features = static_cast<int64_t>(run.count);
    r.bags.mode = run.mode;
    for (size_t i = run.first; i < run.first + run.count; ++i) {
      const TableStage& t = p.tables[i];
      *table++ = {t.rows,
                  t.num_rows,
                  t.projection ? t.projection->rank : t.vectors * p.dim,
                  t.row_bytes,
                  b.first_bag(t.feature) + begin,
                  t.projection ? codes + code : parts + t.part * p.dim,
                  t.projection ? num_codes_ : parts_stride,
                  t.format};
      code += codes_of(t);
    }
    // The bags between this and the next feature's first are as many as the batch has; a block is `samples`.
    table->first_bag = table[-1].first_bag + b.batch;
    ++table;
    if (!k.embedding_bag->forward(r, {0, 0, 0}, {1, 0, 0}, nullptr)) return false;
  }
  if (num_codes_) project(b, begin, samples, codes, scratch + l.ones, parts, parts_stride);
  for (size_t t = 0; t < p.decoders.size(); ++t) {
    const int64_t first = b.first_bag(p.decoders[t].feature), start = b.bag_begin(first);
    for (int s = 0; s < samples; ++s)
      k.dhe->pool(w.pools[t], b.bag_begin(first + begin + s) - start,
                  b.bag_begin(first + begin + s + 1) - start,
                  parts + s * parts_stride + p.decoders[t].part * p.dim);
  }
  if (mixed)
    k.dense->mix(p.mixing.data(), static_cast<int64_t>(p.mixing.size()), p.dim, parts, parts_stride, samples,
                 vectors, l.vectors_stride);

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
  for (const TableStage& t : parts_.tables) bounds.emplace_back(t.feature, t.num_rows);
  throw_first_error(b, bounds);
}

void Program::run(const Batch& batch, float* scores, int threads) const {
  const Bags& b = batch.bags;
  const int64_t samples = b.batch;
  check_bags(b, parts_.num_features);
  if (samples == 0) return;
  static thread_local Workspace own_workspace;
  Workspace& w = own_workspace;  // the same object in every thread
  static thread_local bool forwards;
  const bool backwards = forwards = !forwards;

  int64_t multiply_adds = multiply_adds_ * samples;
  if (!parts_.decoders.empty()) {
    plan_decoding(b, threads, w);
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
