// Pooled look-ups in embedding tables, many tables per call. README.md has the formula.
// Inline functions here are always inlined: the files compiled for an ISA must not leave copies for others.
#pragma once
#include <cstdint>

#include "common/integers.h"
#include "rows/formats.h"

namespace mprec {

enum class Mode { sum = 0, mean = 1, max = 2 };

// A table and where its bags' results go. Its bags are [first_bag, first_bag of the next feature).
struct Feature {
  const char* rows;
  int64_t num_rows, dim;
  int64_t row_bytes;  // from one row to the next
  int64_t first_bag;
  float* out;          // or what out_format says
  int64_t out_stride;  // elements from one bag's result to the next
  Format format = Format::f32, out_format = Format::f32;
};

struct BagRequest {
  Integers indices;  // feature-major
  Integers offsets;  // bag b holds indices[offsets[b]] .. indices[offsets[b + 1] - 1]; a missing last entry
                     // is indices.size
  const Feature* features;  // num_features of them, then one whose first_bag is num_bags
  int64_t num_features, num_bags;
  const float* per_sample_weights;  // one per index, or null
  Mode mode;
  int64_t padding_idx;  // indices of this value are left out; -1: none
  // Bags are pooled in blocks of so many of each feature, a block's features in turn; the driver says.
  int64_t block_bags = 1;

  __attribute__((always_inline)) int64_t bag_begin(int64_t bag) const {
    return bag < offsets.size ? offsets[bag] : indices.size;
  }
  // The feature's first bag in a block: its bags there end where those in the next block begin.
  __attribute__((always_inline)) int64_t block_begin(const Feature& f, int64_t block) const {
    const int64_t bags = (&f)[1].first_bag - f.first_bag, before = block * block_bags;
    return f.first_bag + (before < bags ? before : bags);
  }
};

// Where the bags of a request, in the order in which they are pooled, may be cut in two: the later part
// begins with `bag`, one of the feature's in the block.
struct Cut {
  int64_t block, feature, bag;
};

// Writes every bag's result. IdError or OffsetsError (naming the first offender) if the indices or offsets
// are invalid; results are then unspecified, but nothing outside the tables has been read.
void embedding_bag_forward(const BagRequest&, int threads);

// Finds the first invalid offset, else the first invalid ID, and throws. For when a kernel has met one.
[[noreturn]] void throw_first_error(const BagRequest&);

// Rough count of cache lines that a request touches: the measure by which work is split.
int64_t embedding_bag_cost(const BagRequest&);

struct EmbeddingBagKernels {
  // Pools the bags between two cuts; false if it met an invalid offset or ID. `scratch` holds one float32
  // result; null if every result is float32.
  bool (*forward)(const BagRequest&, const Cut& begin, const Cut& end, float* scratch);
};

}  // namespace mprec
