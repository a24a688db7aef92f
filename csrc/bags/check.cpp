#include "bags/check.h"

#include <algorithm>

namespace mprec {

std::string BagLayout::name(int64_t bag) const {
  if (num_features == 1) return message("bag ", bag);
  int64_t feature = bags_each ? bag / bags_each : 0;
  if (!first_bags.empty())
    feature = std::upper_bound(first_bags.begin(), first_bags.end() - 1, bag) - first_bags.begin() - 1;
  return message("feature ", feature, ", bag ", bag - first_bag(feature));
}

void check_offsets(const Integers& offsets, int64_t num_indices, const BagLayout& layout) {
  const int64_t bags = layout.num_bags();
  if (bags == 0 && num_indices > 0)
    throw OffsetsError(message("offsets: describe no bags, but there are ", num_indices, " indices"));
  int64_t previous = 0;
  for (int64_t b = 0; b <= bags; ++b) {
    const int64_t begin = offset_at(offsets, num_indices, b);
    const auto where = [&] {
      return message("offsets[", b, "] (", b < bags ? layout.name(b) : std::string("the end"), ") is ",
                     begin);
    };
    if (b == 0 && begin != 0) throw OffsetsError(message(where(), ", expected 0"));
    if (begin < previous)
      throw OffsetsError(message(where(), ", less than the offset before it, ", previous,
                                 ": expected offsets that never fall"));
    if (begin > num_indices)
      throw OffsetsError(message(where(), ", expected at most the number of indices, ", num_indices));
    previous = begin;
  }
  if (previous != num_indices)
    throw OffsetsError(message("offsets[", bags, "] (the end) is ", previous,
                               ", expected the number of indices, ", num_indices));
}

void check_ids(const Integers& indices, const Integers& offsets, const BagLayout& layout,
               const std::vector<std::pair<int64_t, int64_t>>& bounds) {
  for (const auto& [feature, bound] : bounds)
    for (int64_t bag = layout.first_bag(feature); bag < layout.first_bag(feature + 1); ++bag) {
      const int64_t end = offset_at(offsets, indices.size, bag + 1);
      for (int64_t i = offset_at(offsets, indices.size, bag); i < end; ++i)
        if (indices[i] < 0 || (bound >= 0 && indices[i] >= bound))
          throw id_error("indices", i, layout.name(bag), indices[i], bound);
    }
}

IdError id_error(const char* name, int64_t position, const std::string& where, int64_t id, int64_t bound) {
  return IdError(message(name, "[", position, "]", where.empty() ? "" : " (" + where + ")", " is ", id,
                         ", not in the valid range [0, ", bound < 0 ? "2**63" : std::to_string(bound), ")"));
}

}  // namespace mprec
