#include "program/halves.h"

#include <algorithm>
#include <atomic>

#include "common/parallel.h"

namespace mprec {
namespace {

constexpr int64_t lookups_per_thread = 2048;  // that repay waking a thread

}  // namespace

bool Halves::divide(const std::vector<HotStage>& stages, const Bags& b, int threads) {
  features_ = static_cast<int64_t>(stages.size());
  bags_ = b.batch + 1;
  int64_t entries = 0;
  for (const HotStage& s : stages) entries += b.feature_begin(s.feature + 1) - b.feature_begin(s.feature);
  // A place more for each feature: where the next ID of a half would go is written to before it is known
  // whether there is one.
  for (auto* indices : {&rows_, &ids_}) indices->resize(entries + features_);
  for (auto* offsets : {&row_offsets_, &id_offsets_}) offsets->resize(features_ * bags_);

  const auto team = static_cast<int>(std::clamp<int64_t>(entries / lookups_per_thread, 1, threads));
  std::atomic<bool> valid{true};
  parallel_parts(features_, team, [&](int64_t h, int) {
    int64_t first_entry = h;
    for (int64_t i = 0; i < h; ++i)
      first_entry += b.feature_begin(stages[i].feature + 1) - b.feature_begin(stages[i].feature);
    if (!divide(stages[h], b, h * bags_, first_entry)) valid = false;
  });
  return valid;
}

bool Halves::divide(const HotStage& stage, const Bags& b, int64_t first_bag, int64_t first_entry) {
  const auto num_ids = static_cast<uint64_t>(stage.ids.num_ids());
  int64_t row = first_entry, other = first_entry;
  for (int64_t i = 0; i < b.batch; ++i) {
    row_offsets_[first_bag + i] = row;
    id_offsets_[first_bag + i] = other;
    const int64_t bag = b.first_bag(stage.feature) + i, end = b.bag_begin(bag + 1);
    for (int64_t e = b.bag_begin(bag); e < end; ++e) {
      const int64_t id = b.indices[e];
      if (static_cast<uint64_t>(id) >= num_ids) return false;
      const int64_t found = stage.ids.find(id);
      rows_[row] = found;  // without a branch: whether an ID is hot cannot be predicted
      ids_[other] = id;
      row += found >= 0;
      other += found < 0;
    }
  }
  row_offsets_[first_bag + b.batch] = row;
  id_offsets_[first_bag + b.batch] = other;
  return true;
}

Bags Halves::view(const std::vector<int64_t>& indices, const std::vector<int64_t>& offsets) const {
  Bags b{};
  b.indices = {indices.data(), static_cast<int64_t>(indices.size()), true};
  b.offsets = {offsets.data(), static_cast<int64_t>(offsets.size()), true};
  b.num_features = features_;
  b.batch = bags_;
  return b;
}

void add_halves(const HotStage& stage, const Bags& batch, int64_t begin, int samples, int dim,
                const float* rest, int64_t rest_stride, float* hot, int64_t hot_stride) {
  const int64_t first = batch.first_bag(stage.feature) + begin;
  for (int s = 0; s < samples; ++s) {
    float* const to = hot + s * hot_stride;
    const float* const from = rest + s * rest_stride;
    const int64_t count = batch.bag_begin(first + s + 1) - batch.bag_begin(first + s);
    if (stage.mode == Mode::mean && count > 1) {
      const auto divisor = static_cast<float>(count);
      for (int j = 0; j < dim; ++j) to[j] = (to[j] + from[j]) / divisor;
    } else {
      for (int j = 0; j < dim; ++j) to[j] += from[j];
    }
  }
}

}  // namespace mprec
