// IDs that training did not see have their feature's mean: they are looked up as one ID that it did see, and
// the bag gets the difference of the mean to that one's vector for each of them.
#pragma once
#include <cstdint>
#include <vector>

#include "program/stages.h"

namespace mprec {

class Unseen {
 public:
  // Counts the unseen IDs of the stages' features, and puts their proxies in their place.
  void replace(const std::vector<UnseenStage>&, const Bags&, int threads);
  // The batch with proxies. IDs that no feature can have are as they were.
  Bags bags() const;
  // Of samples [begin, begin + samples): adds what stage number `index` gives them.
  void add(const UnseenStage&, size_t index, int64_t begin, int samples, int dim, float* parts,
           int64_t parts_stride) const;

 private:
  Bags batch_;
  std::vector<int64_t> ids_;
  std::vector<int32_t> counts_;  // [stage][sample]
};

}  // namespace mprec
