#include "serving/join.h"

#include <algorithm>
#include <stdexcept>

#include "common/error.h"

namespace mprec::serving {
namespace {

int64_t bag(const Part& p, int64_t feature, int64_t sample) { return feature * p.samples + sample; }

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
  for (int64_t t = 0; t < features; ++t)
    for (const Part& p : parts) {
      const int64_t begin = p.offsets[bag(p, t, p.start)], before = id - ids;
      for (int64_t b = p.start; b < p.stop; ++b)
        *offsets++ = static_cast<Offset>(p.offsets[bag(p, t, b)] - begin + before);
      id = copy(p.indices, begin, p.offsets[bag(p, t, p.stop)], id);
    }
  *offsets = static_cast<Offset>(id - ids);
}

}  // namespace

Joined measure(const std::vector<Part>& parts, int64_t features) {
  if (features < 1) throw std::invalid_argument(message("features: expected at least 1, got ", features));
  Joined joined{};
  for (const Part& p : parts) {
    if (p.samples < 0 || p.offsets.size != features * p.samples + 1)
      throw OffsetsError(message("offsets: expected ", features, " features of ", p.samples,
                                 " samples each, so ", features * p.samples + 1, ", got ", p.offsets.size));
    if (p.start < 0 || p.start > p.stop || p.stop > p.samples)
      throw std::invalid_argument(message("starts, stops: expected samples within 0 to ", p.samples, ", got ",
                                          p.start, " to ", p.stop));
    for (int64_t t = 0; t < features; ++t) {
      const int64_t begin = p.offsets[bag(p, t, p.start)], end = p.offsets[bag(p, t, p.stop)];
      if (begin < 0 || end < begin || end > p.indices.size)
        throw OffsetsError(message("offsets of feature ", t,
                                   ": expected to rise from 0 to the number of indices, ", p.indices.size,
                                   ", got ", begin, " to ", end));
      joined.ids += end - begin;
    }
    joined.samples += p.stop - p.start;
    joined.wide_ids |= p.indices.wide;
    joined.wide_offsets |= p.offsets.wide;
  }
  return joined;
}

void join(const std::vector<Part>& parts, int64_t features, const Joined& joined, void* ids, void* offsets) {
  const auto write = [&](auto* id) {
    if (joined.wide_offsets)
      fill(parts, features, id, static_cast<int64_t*>(offsets));
    else
      fill(parts, features, id, static_cast<int32_t*>(offsets));
  };
  if (joined.wide_ids)
    write(static_cast<int64_t*>(ids));
  else
    write(static_cast<int32_t*>(ids));
}

}  // namespace mprec::serving
