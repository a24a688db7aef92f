// The distinct values among some IDs, in order of first appearance.
#pragma once
#include <cstdint>

namespace mprec {

// Of ids[positions[0 .. n)]: the distinct ones go to `distinct_ids` (room for n), and inverse[i] says which
// of them ids[positions[i]] is. Returns their number.
int64_t distinct(const int64_t* ids, const int64_t* positions, int64_t n, int64_t* distinct_ids,
                 int64_t* inverse);

}  // namespace mprec
