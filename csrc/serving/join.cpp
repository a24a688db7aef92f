#include "serving/join.h"

#include <algorithm>
#include <stdexcept>

#include "common/error.h"

namespace mprec::serving {
namespace {

template <class Out>
Out* copy(const Integers& from, int64_t begin, int64_t end, Out* out) {
  return from.wide ? std::copy(static_cast<const int64_t*>(from.data) + begin,
                               static_cast<const int64_t*>(from.data) + end, out)
                   : std::copy(static_cast<const int32_t*>(from.data) + begin,
                               static_cast<const int32_t*>(from.data) + end, out);
}

template <class Id, class Offset>
void fill(const std::vector<Part>& parts, int64_t features, Id* const ids, Offset* offsets) {
  Id* id = ids;
  for (int64_t f = 0; f < features; ++f)
    for (const auto& [b, start, stop] : parts) {
      const int64_t first = b.first_bag(f), begin = b.offsets[first + start], before = id - ids;
      for (int64_t s = start; s < stop; ++s)
        *offsets++ = static_cast<Offset>(b.offsets[first + s] - begin + before);
      id = copy(b.indices, begin, b.offsets[first + stop], id);
    }
  *offsets = static_cast<Offset>(id - ids);
}

}  // namespace

Bags joined_bags(const std::vector<Part>& parts, int64_t features) {
  if (features < 1) throw std::invalid_argument(message("features: expected at least 1, got ", features));
  Bags joined{};
  joined.num_features = features;
  for (const auto& [b, start, stop] : parts) {
    if (b.num_features != features || b.batch < 0 || b.offsets.size != b.num_bags() + 1)
      throw OffsetsError(message("offsets: expected ", features, " features of ", b.batch,
                                 " samples each, so ", features * b.batch + 1, ", got ", b.offsets.size));
    if (start < 0 || start > stop || stop > b.batch)
      throw std::invalid_argument(
          message("starts, stops: expected samples within 0 to ", b.batch, ", got ", start, " to ", stop));
    for (int64_t f = 0; f < features; ++f) {
      const int64_t begin = b.offsets[b.first_bag(f) + start], end = b.offsets[b.first_bag(f) + stop];
      if (begin < 0 || end < begin || end > b.indices.size)
        throw OffsetsError(message("offsets of feature ", f,
                                   ": expected to rise from 0 to the number of indices, ", b.indices.size,
                                   ", got ", begin, " to ", end));
      joined.indices.size += end - begin;
    }
    joined.batch += stop - start;
    joined.indices.wide |= b.indices.wide;
    joined.offsets.wide |= b.offsets.wide;
  }
  joined.offsets.size = joined.num_bags() + 1;
  return joined;
}

void join(const std::vector<Part>& parts, const Bags& to) {
  void *const ids = const_cast<void*>(to.indices.data), *const offsets = const_cast<void*>(to.offsets.data);
  const auto write = [&](auto* id) {
    if (to.offsets.wide)
      fill(parts, to.num_features, id, static_cast<int64_t*>(offsets));
    else
      fill(parts, to.num_features, id, static_cast<int32_t*>(offsets));
  };
  if (to.indices.wide)
    write(static_cast<int64_t*>(ids));
  else
    write(static_cast<int32_t*>(ids));
}

}  // namespace mprec::serving
