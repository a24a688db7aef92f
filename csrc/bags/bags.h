// A batch of bags: which IDs each sample has for each feature, and how they are pooled.
// Inline functions here are always inlined: the files compiled for an ISA must not leave copies for others.
#pragma once
#include <cstdint>

#include "common/integers.h"

namespace mprec {

enum class Mode { sum = 0, mean = 1, max = 2 };

// Feature after feature. Does not own what it points to. Offsets and IDs may hold anything until they have
// been checked (bags/check.h); there are as many offsets as bags, or one more.
struct Bags {
  Integers indices;
  Integers offsets;  // bag b holds indices[offsets[b]] .. indices[offsets[b + 1] - 1]; a missing last entry
                     // is indices.size
  const int64_t* first_bags = nullptr;  // of each feature, and their number; null: features have `batch` each
  int64_t num_features = 1, batch = 0;
  const float* per_sample_weights = nullptr;  // one per index; null: ones
  Mode mode = Mode::sum;
  int64_t padding_idx = -1;  // indices of this value are left out; -1: none

  // The bags of feature f are [first_bag(f), first_bag(f + 1)).
  __attribute__((always_inline)) int64_t first_bag(int64_t feature) const {
    return first_bags ? first_bags[feature] : feature * batch;
  }
  __attribute__((always_inline)) int64_t num_bags() const { return first_bag(num_features); }
  // Where a bag's indices begin, and where a feature's do: they end where those of the next one begin.
  __attribute__((always_inline)) int64_t bag_begin(int64_t bag) const {
    return bag < offsets.size ? offsets[bag] : indices.size;
  }
  __attribute__((always_inline)) int64_t feature_begin(int64_t feature) const {
    return bag_begin(first_bag(feature));
  }
};

}  // namespace mprec
