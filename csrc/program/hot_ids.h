// The IDs that have rows of their own, found by halving: the upper bits of an ID say between which two of
// the sorted IDs it lies, if at all, and few are left there.
#pragma once
#include <cstdint>
#include <vector>

namespace mprec {

class HotIds {
 public:
  // Of a vocabulary of `num_ids`. std::invalid_argument unless the IDs rise, each above the one before, in
  // [0, num_ids).
  HotIds(std::vector<int64_t> ids, int64_t num_ids);

  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  int64_t num_ids() const { return num_ids_; }
  int64_t nbytes() const;
  // The row of an ID in [0, num_ids): its place among the sorted ones; -1 if it is none of them.
  int64_t find(int64_t id) const {
    const int64_t bucket = id >> shift_;
    const int64_t* first = ids_.data() + begins_[bucket];
    for (int64_t count = begins_[bucket + 1] - begins_[bucket]; count > 0;) {
      const int64_t half = count / 2;
      const bool right = first[half] < id;
      first += right ? half + 1 : 0;
      count = right ? count - half - 1 : half;
    }
    const int64_t place = first - ids_.data();
    return place < size() && *first == id ? place : -1;
  }

 private:
  std::vector<int64_t> ids_;
  int64_t num_ids_;
  int shift_ = 0;
  std::vector<uint32_t>
      begins_;  // bucket b: places begins_[b] ... begins_[b + 1] - 1, of IDs b << shift_ and on
};

}  // namespace mprec
