// Feature-major batches joined and cut. The bags of a feature lie together in them, so that neither is a
// plain concatenation.
#pragma once
#include <cstdint>
#include <vector>

#include "common/integers.h"

namespace mprec::serving {

// Samples `start` to `stop` of a batch of `samples`.
struct Part {
  Integers indices, offsets;
  int64_t samples, start, stop;
};

// What the parts have together.
struct Joined {
  int64_t samples, ids;
  bool wide_ids, wide_offsets;  // int64, as soon as a part's are
};

// std::invalid_argument or OffsetsError if a part is not one of a batch of `features` features.
Joined measure(const std::vector<Part>& parts, int64_t features);

// Writes the parts' IDs and offsets (features * samples + 1), of the widths that `measure` told.
void join(const std::vector<Part>& parts, int64_t features, const Joined& joined, void* ids, void* offsets);

}  // namespace mprec::serving
