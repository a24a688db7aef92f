#include "bags/check.h"

#include <algorithm>

namespace mprec {
namespace {

// "feature 2, bag 0"; of one feature, "bag 0".
std::string name(const Bags& b, int64_t bag) {
  if (b.num_features == 1) return message("bag ", bag);
  int64_t feature = b.batch ? bag / b.batch : 0;
  if (b.first_bags)
    feature = std::upper_bound(b.first_bags, b.first_bags + b.num_features, bag) - b.first_bags - 1;
  return message("feature ", feature, ", bag ", bag - b.first_bag(feature));
}

// 0 = offsets[0] <= offsets[1] <= ... <= indices: no bit of sign in any offset, difference or distance to the
// end. A loop without branches.
template <class Offset>
bool rise(const Offset* offsets, int64_t count, int64_t indices) {
  uint64_t signs = 0, before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto offset = static_cast<uint64_t>(static_cast<int64_t>(offsets[i]));
    signs |= offset | (static_cast<uint64_t>(indices) - offset) | (offset - before);
    before = offset;
  }
  return static_cast<int64_t>(signs) >= 0 && (count == 0 || offsets[0] == 0);
}

bool offsets_hold(const Bags& b) {
  const int64_t bags = b.num_bags(), count = std::min(b.offsets.size, bags + 1), n = b.indices.size;
  return (b.offsets.wide ? rise(static_cast<const int64_t*>(b.offsets.data), count, n)
                         : rise(static_cast<const int32_t*>(b.offsets.data), count, n)) &&
         b.bag_begin(bags) == n && (bags > 0 || n == 0);
}

void throw_first_bad_offset(const Bags& b) {
  const int64_t bags = b.num_bags(), n = b.indices.size;
  if (bags == 0 && n > 0)
    throw OffsetsError(message("offsets: describe no bags, but there are ", n, " indices"));
  int64_t previous = 0;
  for (int64_t bag = 0; bag <= bags; ++bag) {
    const int64_t begin = b.bag_begin(bag);
    const auto where = [&] {
      return message("offsets[", bag, "] (", bag < bags ? name(b, bag) : "the end", ") is ", begin);
    };
    if (bag == 0 && begin != 0) throw OffsetsError(message(where(), ", expected 0"));
    if (begin < previous)
      throw OffsetsError(message(where(), ", less than the offset before it, ", previous,
                                 ": expected offsets that never fall"));
    if (begin > n) throw OffsetsError(message(where(), ", expected at most the number of indices, ", n));
    previous = begin;
  }
  if (previous != n)
    throw OffsetsError(
        message("offsets[", bags, "] (the end) is ", previous, ", expected the number of indices, ", n));
}

}  // namespace

void check_offsets(const Bags& b) {
  if (offsets_hold(b)) return;
  throw_first_bad_offset(b);
  throw OffsetsError("offsets were changed by another thread during the call");
}

void check_ids(const Bags& b, const Bounds& bounds) {
  for (const auto& [feature, bound] : bounds)
    for (int64_t bag = b.first_bag(feature); bag < b.first_bag(feature + 1); ++bag)
      for (int64_t i = b.bag_begin(bag), end = b.bag_begin(bag + 1); i < end; ++i)
        if (const int64_t id = b.indices[i]; id < 0 || (bound >= 0 && id >= bound))
          throw id_error("indices", i, name(b, bag), id, bound);
}

void check_ids(const Integers& ids, int64_t bound, const char* name) {
  const uint64_t end = bound < 0 ? uint64_t{1} << 63 : static_cast<uint64_t>(bound);
  bool within = true;
  for (int64_t i = 0; i < ids.size; ++i) within &= static_cast<uint64_t>(ids[i]) < end;
  for (int64_t i = 0; !within && i < ids.size; ++i)
    if (static_cast<uint64_t>(ids[i]) >= end) throw id_error(name, i, "", ids[i], bound);
}

void throw_first_error(const Bags& b, const Bounds& bounds) {
  check_offsets(b);
  check_ids(b, bounds);
  throw std::runtime_error("indices or offsets were changed by another thread during the call");
}

const int64_t* checked_ids(const Bags& b, int64_t largest, std::vector<int64_t>& storage) {
  const int64_t* ids = static_cast<const int64_t*>(b.indices.data);
  if (!b.indices.wide) {
    storage.resize(b.indices.size);
    for (int64_t i = 0; i < b.indices.size; ++i) storage[i] = b.indices[i];
    ids = storage.data();
  }
  uint64_t signs = 0;  // the highest bit: of any ID, or of any difference to the largest allowed
  for (int64_t i = 0; i < b.indices.size; ++i) {
    const uint64_t id = static_cast<uint64_t>(ids[i]);
    signs |= id | (static_cast<uint64_t>(largest) - id);
  }
  if (static_cast<int64_t>(signs) < 0) {
    Bounds bounds;
    for (int64_t f = 0; f < b.num_features; ++f)
      bounds.emplace_back(f, largest == INT64_MAX ? -1 : largest + 1);
    check_ids(b, bounds);
  }
  return ids;
}

IdError id_error(const char* name, int64_t position, const std::string& where, int64_t id, int64_t bound) {
  return IdError(message(name, "[", position, "]", where.empty() ? "" : " (" + where + ")", " is ", id,
                         ", not in the valid range [0, ", bound < 0 ? "2**63" : std::to_string(bound), ")"));
}

}  // namespace mprec
