// A cursor that runs ahead of the pooling: validates each ID once and prefetches its row.
#pragma once
#include "common/vec.h"
#include "embedding_bag/embedding_bag.h"

namespace mprec::MPREC_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

class Lookahead {
 public:
  // Over the indices of bags [begin, end), the first of which belongs to `feature`.
  Lookahead(const BagRequest& r, const Feature* feature, int64_t begin, int64_t end)
      : request_(r), end_bag_(end) {
    cursor_ = clamped(begin);
    end_ = clamped(end);
    enter(feature);
  }

  // Validates every index before `position`, and prefetches some rows beyond. False at an invalid ID.
  bool to(int64_t position) {
    return cursor_ >= least(position + distance_ / 2, end_) || advance(position + distance_);
  }

  // Rows to pool between two calls of `to`, so that prefetches and reads alternate in short bursts.
  int64_t stride() const { return distance_ / 2; }

  // Where the indices of a feature end, as far as this range of bags goes. No bag may reach beyond: the
  // indices there are validated for the next feature's table.
  int64_t limit(const Feature* f) const { return clamped(least(f[1].first_bag, end_bag_)); }

 private:
  int64_t clamped(int64_t bag) const {  // offsets are not validated yet
    return most(0, least(request_.bag_begin(bag), request_.indices.size));
  }
  void enter(const Feature* f) {
    feature_ = f;
    feature_end_ = limit(f);
    rows_ = f->rows;
    num_rows_ = f->num_rows;
    row_bytes_ = f->row_bytes;
    size_ = row_size(f->format, f->dim);
    straddles_ = row_bytes_ % 64 != 0 || reinterpret_cast<uintptr_t>(rows_) % 64 != 0;
    distance_ = most(8, least(32, 4096 / (size_ + 1)));
  }
  __attribute__((noinline)) bool advance(int64_t target) {
    const Integers ids = request_.indices;
    target = least(target, end_);
    int64_t cursor = cursor_;
    while (cursor < target) {
      if (cursor >= feature_end_) {
        if (!next_feature()) return false;
        continue;
      }
      const char* const rows = rows_;
      const int64_t stop = least(target, feature_end_), row_bytes = row_bytes_, size = size_;
      const auto num_rows = static_cast<uint64_t>(num_rows_);
      const bool straddles = straddles_;
      for (; cursor < stop; ++cursor) {
        const int64_t id = ids[cursor];
        if (static_cast<uint64_t>(id) >= num_rows) return false;
        const char* row = rows + id * row_bytes;
        for (int64_t i = 0; i < size; i += 64) prefetch(row + i);
        if (straddles) prefetch(row + size - 1);
      }
    }
    cursor_ = cursor;
    return true;
  }
  bool next_feature() {
    if (feature_[1].first_bag >= end_bag_) return false;
    enter(feature_ + 1);
    return true;
  }

  const BagRequest& request_;
  int64_t end_bag_, cursor_, end_, feature_end_;
  const Feature* feature_;
  const char* rows_;
  int64_t num_rows_, row_bytes_, size_;
  int64_t distance_;  // rows
  bool straddles_;
};

}  // namespace mprec::MPREC_ISA
