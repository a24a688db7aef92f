// How a program is put together: do its parts fit, and which tables are pooled by one call?
#include <stdexcept>

#include "common/error.h"
#include "program/program.h"

namespace mprec {
namespace {

constexpr int64_t most = 4096;  // parts, vectors, numbers in a code

void check_table(const TableStage& stage, int dim) {
  if (stage.vectors < 1 || stage.vectors > most)
    throw std::invalid_argument(message("tables: rows of ", stage.vectors, " vectors"));
  if (!stage.projection) return;
  const Projection& p = *stage.projection;
  if (p.rank < 1 || p.rank > most) throw std::invalid_argument(message("projections: rank ", p.rank));
  if (stage.vectors != 1 || stage.mode == Mode::max)
    throw std::invalid_argument("projections: expected rows of one vector, pooled by sum or mean");
  if (p.matrix.size() != static_cast<size_t>(p.rank) * dim ||
      (!p.bias.empty() && p.bias.size() != static_cast<size_t>(dim)))
    throw std::invalid_argument(
        message("projections: expected a matrix [", p.rank, ", ", dim, "] and a bias [", dim, "]"));
}

void check_decoder(const DecoderView& decoder, int dim) {
  if (decoder.dim != dim)
    throw std::invalid_argument(
        message("decoders: expected vectors of ", dim, " numbers, got ", decoder.dim));
}

// The rows of a stage's half, or its rest's.
void check_half(const TableStage& half, int64_t rows) {
  if (half.vectors != 1) throw std::invalid_argument("hot: expected rows of one vector");
  if (half.num_rows < rows)
    throw std::invalid_argument(message("hot: expected ", rows, " rows, got ", half.num_rows));
}

}  // namespace

Program::Program(Parts parts) : parts_(std::move(parts)) {
  if (parts_.num_features < 1) throw std::invalid_argument("num_features: expected at least 1");
  if (parts_.dim < 1) throw std::invalid_argument(message("dim: expected at least 1, got ", parts_.dim));
  count_parts();
  check_parts();
  check_unseen();
  add_stages_of_halves();
  plan_runs();

  int64_t vectors = 1 + num_parts_;
  if (!parts_.mixing.empty()) vectors = 1 + parts_.mixing.back().vector;
  if (vectors > most)
    throw std::invalid_argument(message("stages: at most ", most, " vectors interact, got ", vectors));
  interaction_ = {static_cast<int>(vectors), parts_.dim, false};
  check_layers();
  const bool dot = parts_.interaction == Interaction::dot;
  multiply_adds_ = parts_.top->view().multiply_adds() +
                   (parts_.bottom ? parts_.bottom->view().multiply_adds() : 0) +
                   (dot ? interaction_.products() * parts_.dim : 0) + num_codes_ * parts_.dim;
}

void Program::count_parts() {
  num_parts_ = static_cast<int64_t>(parts_.decoders.size() + parts_.hot.size());
  for (const TableStage& stage : parts_.tables) {
    check_table(stage, parts_.dim);
    num_parts_ += stage.vectors;
  }
  for (CachedStage& stage : parts_.cached) {
    if (stage.features.size() != stage.parts.size())
      throw std::invalid_argument(message("cached: expected a part for each of ", stage.features.size(),
                                          " decoders, got ", stage.parts.size()));
    num_parts_ += static_cast<int64_t>(stage.parts.size());
    for (CachedFeature& feature : stage.features) {
      check_decoder(feature.decoder, parts_.dim);
      feature.column = cached_floats_;
      cached_floats_ += parts_.dim;
    }
  }
  if (num_parts_ > most)
    throw std::invalid_argument(message("stages: at most ", most, " parts, got ", num_parts_));
  for (const DecoderStage& stage : parts_.decoders) check_decoder(stage.decoder, parts_.dim);
}

void Program::check_parts() const {
  const auto& p = parts_;
  std::vector<bool> filled(num_parts_);
  const auto fill = [&](int64_t feature, int64_t first, int64_t count) {
    if (feature < 0 || feature >= p.num_features)
      throw std::invalid_argument(message("stages: feature ", feature, " is none of the ", p.num_features));
    for (int64_t part = first; part < first + count; ++part) {
      if (part < 0 || part >= num_parts_ || filled[part])
        throw std::invalid_argument(
            message("stages: expected each part below ", num_parts_, " once, got ", part));
      filled[part] = true;
    }
  };
  for (size_t i = 0; i < p.tables.size(); ++i) {
    fill(p.tables[i].feature, p.tables[i].part, p.tables[i].vectors);
    if (i > 0 && p.tables[i].feature <= p.tables[i - 1].feature)
      throw std::invalid_argument("tables: expected features in order");
  }
  for (const DecoderStage& stage : p.decoders) fill(stage.feature, stage.part, 1);
  for (const CachedStage& stage : p.cached)
    for (size_t i = 0; i < stage.parts.size(); ++i) fill(stage.features[i].position, stage.parts[i], 1);
  for (const HotStage& stage : p.hot) fill(stage.feature, stage.part, 1);
  int last = 0;
  for (const MixTerm& term : p.mixing) {
    if (term.vector != last && term.vector != last + 1)
      throw std::invalid_argument("mixing: expected terms of vectors 1, 2, and so on, in order");
    if (term.vector < 1 || term.part < 0 || term.part >= num_parts_)
      throw std::invalid_argument(message("mixing: vector ", term.vector, " of part ", term.part));
    last = term.vector;
  }
}

void Program::check_unseen() const {
  std::vector<bool> met(parts_.num_features);
  for (const UnseenStage& stage : parts_.unseen) {
    if (stage.feature < 0 || stage.feature >= parts_.num_features || met[stage.feature])
      throw std::invalid_argument(message("unseen: expected each feature below ", parts_.num_features,
                                          " at most once, got ", stage.feature));
    met[stage.feature] = true;
    if (stage.proxy < 0 || !stage.is_known(stage.proxy))
      throw std::invalid_argument(
          message("unseen: ID ", stage.proxy, ", which stands for others, is unknown"));
    const auto numbers = static_cast<int64_t>(stage.correction.size());
    if (stage.part < 0 || numbers % parts_.dim != 0 || stage.part > num_parts_ - numbers / parts_.dim)
      throw std::invalid_argument(message("unseen: ", numbers, " numbers from part ", stage.part,
                                          " on are none of ", num_parts_, " parts of ", parts_.dim));
  }
}

// Halves of bags are pooled as bags are, by stages behind the others; the rest's vectors are no parts.
void Program::add_stages_of_halves() {
  auto& p = parts_;
  for (size_t h = 0; h < p.hot.size(); ++h) {
    HotStage& stage = p.hot[h];
    if (stage.mode == Mode::max) throw std::invalid_argument("hot: pooled by sum or mean, got max");
    TableStage rows = stage.rows;
    rows.bags = BagsOf::hot;
    rows.feature = static_cast<int64_t>(h);
    rows.part = stage.part;
    rows.mode = Mode::sum;
    check_half(rows, stage.ids.size());
    check_table(rows, p.dim);
    p.tables.push_back(std::move(rows));
  }
  for (size_t h = 0; h < p.hot.size(); ++h) {
    const auto set = [&](auto& rest) {
      rest.bags = BagsOf::rest;
      rest.feature = rest.part = static_cast<int64_t>(h);
      rest.mode = Mode::sum;
    };
    if (const auto* table = std::get_if<TableStage>(&p.hot[h].rest)) {
      check_half(*table, p.hot[h].ids.num_ids());
      p.tables.push_back(*table);
      set(p.tables.back());
      check_table(p.tables.back(), p.dim);
    } else {
      p.decoders.push_back(std::get<DecoderStage>(p.hot[h].rest));
      set(p.decoders.back());
      check_decoder(p.decoders.back().decoder, p.dim);
    }
  }
}

void Program::plan_runs() {
  for (size_t i = 0; i < parts_.tables.size(); ++i) {
    const TableStage& t = parts_.tables[i];
    if (t.projection) num_codes_ += t.projection->rank;
    const bool follows = i > 0 && t.bags == parts_.tables[i - 1].bags &&
                         t.feature == parts_.tables[i - 1].feature + 1 && t.mode == runs_.back().mode;
    if (follows)
      ++runs_.back().count;
    else
      runs_.push_back({i, 1, t.mode, t.bags});
  }
}

void Program::check_layers() const {
  const auto& p = parts_;
  if (p.bottom ? p.bottom->inputs() != p.num_dense || p.bottom->outputs() != p.dim
               : p.num_dense != 0 || static_cast<int>(p.constant.size()) != p.dim)
    throw std::invalid_argument(message("bottom: expected layers from ", p.num_dense, " numbers to ", p.dim));
  const int64_t inputs = p.interaction == Interaction::dot ? p.dim + interaction_.products()
                                                           : int64_t{interaction_.vectors} * p.dim;
  if (!p.top || p.top->inputs() != inputs || p.top->outputs() != 1)
    throw std::invalid_argument(message("top: expected layers from ", inputs, " numbers to 1"));
}

int64_t Program::nbytes() const {
  int64_t sum = parts_.top->nbytes() + (parts_.bottom ? parts_.bottom->nbytes() : 0);
  for (const HotStage& stage : parts_.hot) sum += stage.ids.nbytes();
  return sum;
}

}  // namespace mprec
