#include "bags/select.h"

#include <cstring>

namespace mprec {

void select_features(const Integers& indices, const Integers& offsets, const float* weights,
                     const std::vector<int64_t>& features, int64_t bags, SelectedBags& to) {
  const int64_t width = indices.wide ? 8 : 4;
  int64_t total = 0, bag = 0;
  for (const int64_t f : features)
    total += offset_at(offsets, indices.size, (f + 1) * bags) - offset_at(offsets, indices.size, f * bags);
  to.index_bytes.resize(total * width);
  to.starts.resize(static_cast<int64_t>(features.size()) * bags + 1);
  to.weights.resize(weights ? total : 0);
  int64_t at = 0;
  for (const int64_t f : features) {
    const int64_t begin = offset_at(offsets, indices.size, f * bags),
                  n = offset_at(offsets, indices.size, (f + 1) * bags) - begin;
    if (n > 0) {
      std::memcpy(to.index_bytes.data() + at * width, static_cast<const char*>(indices.data) + begin * width,
                  n * width);
      if (weights) std::memcpy(to.weights.data() + at, weights + begin, n * sizeof(float));
    }
    for (int64_t b = 0; b < bags; ++b)
      to.starts[bag++] = offset_at(offsets, indices.size, f * bags + b) - begin + at;
    at += n;
  }
  to.starts[bag] = at;
  to.indices = {to.index_bytes.data(), total, indices.wide};
  to.offsets = {to.starts.data(), bag + 1, true};
}

}  // namespace mprec
