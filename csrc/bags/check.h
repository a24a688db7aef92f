// The checks of a batch's offsets and IDs: what is wrong is said here, in one wording, whoever found it.
//
// Kernels look at IDs as they read them; once one has met something wrong, the functions here find the first
// offender. So they may take their time.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "common/integers.h"

namespace mprec {

// How a batch's bags are shared among its features: those of feature f are [first_bag(f), first_bag(f + 1)).
struct BagLayout {
  int64_t num_features, bags_each;
  std::vector<int64_t> first_bags = {};  // where they are not as many of each; and their number

  int64_t first_bag(int64_t feature) const {
    return first_bags.empty() ? feature * bags_each : first_bags[feature];
  }
  int64_t num_bags() const { return first_bag(num_features); }
  std::string name(int64_t bag) const;  // "feature 2, bag 0"; of one feature, "bag 0"
};

// Where bag `b` begins; a last entry that offsets lack is the number of indices.
inline int64_t offset_at(const Integers& offsets, int64_t num_indices, int64_t b) {
  return b < offsets.size ? offsets[b] : num_indices;
}

// OffsetsError unless offsets rise from 0 to the number of indices.
void check_offsets(const Integers& offsets, int64_t num_indices, const BagLayout& layout);

// IDs of features: (feature, bound). They are to be below the bound; one below 0 lets any ID pass that is
// not negative. Offsets have been checked. IdError at the first offender, features in the order given.
void check_ids(const Integers& indices, const Integers& offsets, const BagLayout& layout,
               const std::vector<std::pair<int64_t, int64_t>>& bounds);

// "indices[7] (feature 2, bag 0) is 9, not in the valid range [0, 4)"; `where` may be empty.
IdError id_error(const char* name, int64_t position, const std::string& where, int64_t id, int64_t bound);

}  // namespace mprec
