#include "bags/select.h"

#include <cstring>

namespace mprec {

void select_features(const Bags& b, const std::vector<int64_t>& features, SelectedBags& to) {
  const int64_t width = b.indices.wide ? 8 : 4;
  int64_t total = 0, bag = 0, at = 0;
  for (const int64_t f : features) total += b.feature_begin(f + 1) - b.feature_begin(f);
  to.index_bytes.resize(total * width);
  to.starts.resize(static_cast<int64_t>(features.size()) * b.batch + 1);
  to.weights.resize(b.per_sample_weights ? total : 0);
  for (const int64_t f : features) {
    const int64_t begin = b.feature_begin(f), n = b.feature_begin(f + 1) - begin;
    if (n > 0) {
      std::memcpy(to.index_bytes.data() + at * width,
                  static_cast<const char*>(b.indices.data) + begin * width, n * width);
      if (b.per_sample_weights)
        std::memcpy(to.weights.data() + at, b.per_sample_weights + begin, n * sizeof(float));
    }
    for (int64_t i = b.first_bag(f); i < b.first_bag(f + 1); ++i)
      to.starts[bag++] = b.bag_begin(i) - begin + at;
    at += n;
  }
  to.starts[bag] = at;
  to.bags = b;
  to.bags.indices = {to.index_bytes.data(), total, b.indices.wide};
  to.bags.offsets = {to.starts.data(), bag + 1, true};
  to.bags.num_features = static_cast<int64_t>(features.size());
  if (b.per_sample_weights) to.bags.per_sample_weights = to.weights.data();
}

}  // namespace mprec
