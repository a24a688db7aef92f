#include "program/unseen.h"

#include <algorithm>

#include "common/parallel.h"

namespace mprec {
namespace {

constexpr int64_t ids_per_thread = 1 << 14;  // that repay waking a thread

}  // namespace

void Unseen::replace(const std::vector<UnseenStage>& stages, const Bags& b, int threads) {
  batch_ = b;
  const int64_t n = b.indices.size;
  ids_.resize(n);
  counts_.resize(static_cast<int64_t>(stages.size()) * b.batch);
  const auto team = static_cast<int>(std::clamp<int64_t>(n / ids_per_thread, 1, threads));
  parallel_ranges(n, team, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ids_[i] = b.indices[i];
  });
  parallel_parts(static_cast<int64_t>(stages.size()), team, [&](int64_t index, int) {
    const UnseenStage& stage = stages[index];
    const int64_t first = b.first_bag(stage.feature);
    for (int64_t s = 0; s < b.batch; ++s) {
      int32_t count = 0;
      for (int64_t i = b.bag_begin(first + s), end = b.bag_begin(first + s + 1); i < end; ++i) {
        const bool unseen = ids_[i] >= 0 && !stage.is_known(ids_[i]);
        ids_[i] = unseen ? stage.proxy : ids_[i];
        count += unseen;
      }
      counts_[index * b.batch + s] = count;
    }
  });
}

Bags Unseen::bags() const {
  Bags b = batch_;
  b.indices = {ids_.data(), static_cast<int64_t>(ids_.size()), true};
  return b;
}

void Unseen::add(const UnseenStage& stage, size_t index, int64_t begin, int samples, int dim, float* parts,
                 int64_t parts_stride) const {
  const int64_t first = batch_.first_bag(stage.feature) + begin;
  const int32_t* const counts = counts_.data() + static_cast<int64_t>(index) * batch_.batch + begin;
  for (int s = 0; s < samples; ++s) {
    if (counts[s] == 0) continue;
    auto share = static_cast<float>(counts[s]);
    if (stage.averaged)
      share /= static_cast<float>(batch_.bag_begin(first + s + 1) - batch_.bag_begin(first + s));
    float* const to = parts + s * parts_stride + stage.part * dim;
    for (size_t j = 0; j < stage.correction.size(); ++j) to[j] += share * stage.correction[j];
  }
}

}  // namespace mprec
