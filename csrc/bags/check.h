// The checks of a batch's offsets and IDs: what is wrong is said here, in one wording, whoever found it.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bags/bags.h"
#include "common/error.h"

namespace mprec {

// OffsetsError unless offsets rise from 0 to the number of indices.
void check_offsets(const Bags&);

// Features and their bounds: IDs are to be below. A bound below 0 lets any ID pass that is not negative.
using Bounds = std::vector<std::pair<int64_t, int64_t>>;

// IdError at the first ID out of bounds, features in the order given. Offsets have been checked.
void check_ids(const Bags&, const Bounds&);

// Finds the first invalid offset, else the first invalid ID, and throws: for when a kernel, which looks at
// both as it reads them, has met one.
[[noreturn]] void throw_first_error(const Bags&, const Bounds&);

// All IDs as int64, in `storage` if they come as int32; IdError unless they lie in [0, largest].
const int64_t* checked_ids(const Bags&, int64_t largest, std::vector<int64_t>& storage);

// IdError at the first of these IDs, of no bags, that is out of bounds.
void check_ids(const Integers& ids, int64_t bound, const char* name);

// "indices[7] (feature 2, bag 0) is 9, not in the valid range [0, 4)"; `where` may be empty.
IdError id_error(const char* name, int64_t position, const std::string& where, int64_t id, int64_t bound);

}  // namespace mprec
