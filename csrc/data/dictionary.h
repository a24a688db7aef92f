// Values of a column become codes: 0, 1, ... in the order in which they first occur.
//
// Open addressing by a multiplicative hash, eight bytes a slot. Large dictionaries are out of cache, so the
// slots of a block of values are fetched before they are looked at.
#pragma once
#include <cstdint>
#include <vector>

namespace mprec {

// `values` [n] are replaced by their codes. `distinct[code]` is the value, -1 that of rows whose bit `bit` of
// `missing` is set (null: of none); `counts[code]` says how often it occurs in the first `counted` rows.
// std::bad_alloc if there is no memory for the slots.
void encode_values(uint32_t* values, const uint32_t* missing, int bit, int64_t n, int64_t counted,
                   std::vector<int64_t>& distinct, std::vector<int64_t>& counts);

// A checksum of 64 bits, as fast as memory is read: it finds damage, and resists no intent.
uint64_t checksum(const void* data, int64_t bytes);

}  // namespace mprec
