// Some features of a batch, as a batch of their own.
#pragma once
#include <cstdint>
#include <vector>

#include "bags/bags.h"

namespace mprec {

struct SelectedBags {
  Bags bags;  // of what stands below; offsets with the last one
  std::vector<char> index_bytes;
  std::vector<int64_t> starts;
  std::vector<float> weights;
};

// Copies the bags of `features`, in this order and as often as they are named, to `to`, whose memory is used
// again. Features have `batch` bags each; offsets have been checked.
void select_features(const Bags&, const std::vector<int64_t>& features, SelectedBags& to);

}  // namespace mprec
