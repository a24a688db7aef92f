// Some features of a batch, as a batch of their own.
#pragma once
#include <cstdint>
#include <vector>

#include "bags/check.h"
#include "common/integers.h"

namespace mprec {

struct SelectedBags {
  std::vector<char> index_bytes;
  std::vector<int64_t> starts;
  std::vector<float> weights;
  Integers indices{}, offsets{};  // of what stands above; offsets with the last one
};

// Copies the bags of `features`, in this order and as often as they are named, to `to`, whose memory is used
// again. Offsets, one for each of `num_features` * `bags` bags and the last one, have been checked.
void select_features(const Integers& indices, const Integers& offsets, const float* weights,
                     const std::vector<int64_t>& features, int64_t bags, SelectedBags& to);

}  // namespace mprec
