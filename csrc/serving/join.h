// Feature-major batches joined and cut. The bags of a feature lie together in them, so that neither is a
// plain concatenation.
#pragma once
#include <cstdint>
#include <vector>

#include "bags/bags.h"

namespace mprec::serving {

// Samples `start` to `stop` of a batch.
struct Part {
  Bags bags;
  int64_t start, stop;
};

// The bags that the parts make, without memory yet: indices and offsets have no `data`, but their sizes, and
// are int64 as soon as a part's are. std::invalid_argument or OffsetsError if a part is not one of a batch of
// `features` features.
Bags joined_bags(const std::vector<Part>& parts, int64_t features);

// Writes the parts' IDs and offsets to the memory that `to`, of joined_bags(), has by now.
void join(const std::vector<Part>& parts, const Bags& to);

}  // namespace mprec::serving
