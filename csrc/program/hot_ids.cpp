#include "program/hot_ids.h"

#include <stdexcept>
#include <utility>

#include "common/error.h"

namespace mprec {

HotIds::HotIds(std::vector<int64_t> ids, int64_t num_ids) : ids_(std::move(ids)), num_ids_(num_ids) {
  if (num_ids < 1) throw std::invalid_argument(message("num_ids: expected at least 1, got ", num_ids));
  if (ids_.empty() || size() > UINT32_MAX)
    throw std::invalid_argument(message("ids: expected 1 to ", UINT32_MAX, " hot ones, got ", size()));
  int64_t before = -1;
  for (const int64_t id : ids_) {
    if (id <= before || id >= num_ids)
      throw std::invalid_argument(
          message("ids: expected rising ones from 0 to ", num_ids - 1, ", got ", id, " after ", before));
    before = id;
  }
  // One to two buckets for each hot ID: as much memory as the IDs take.
  while ((num_ids - 1) >> shift_ >= 2 * size()) ++shift_;
  const int64_t buckets = ((num_ids - 1) >> shift_) + 1;
  begins_.reserve(buckets + 1);
  for (int64_t place = 0, bucket = 0; bucket <= buckets; ++bucket) {
    while (place < size() && ids_[place] >> shift_ < bucket) ++place;
    begins_.push_back(static_cast<uint32_t>(place));
  }
}

int64_t HotIds::nbytes() const {
  return size() * static_cast<int64_t>(sizeof(int64_t)) +
         static_cast<int64_t>(begins_.size() * sizeof(uint32_t));
}

}  // namespace mprec
