// A cursor that runs ahead of the pooling: validates each ID once, and says which row to prefetch when.
#pragma once
#include "common/vec.h"
#include "embedding_bag/embedding_bag.h"

namespace mprec::MPREC_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// While row i is pooled, the ID at i + shift is to be validated and its row prefetched. Where there is
// nothing to look ahead for, that is row i itself, which is valid.
struct Prefetch {
  int64_t shift;
  const char* rows;
  uint64_t num_rows;
  int64_t row_bytes;
  int64_t last_byte;  // of a row, if it may lie in a cache line of its own; else 0
};

class Lookahead {
 public:
  // Over the indices of bags [begin, end), the first of which belongs to `feature`.
  Lookahead(const BagRequest& r, const Feature* feature, int64_t begin, int64_t end)
      : request_(r), end_bag_(end) {
    cursor_ = clamped(begin);
    end_ = clamped(end);
    enter(feature);
  }

  // What the pooling of the indices [begin, stop) is to prefetch: as many rows further ahead. One for each
  // row that is pooled, because a burst of prefetches blocks the queue to memory. False at an invalid ID.
  bool next(int64_t begin, int64_t stop, Prefetch& prefetch) {
    if (cursor_ < least(most(begin + distance_, stop), end_) && !burst(most(begin + distance_, stop)))
      return false;
    const int64_t count = stop - begin;
    if (cursor_ + count > feature_end_) {  // a feature's last rows, or the last of all
      prefetch = {0, rows_, UINT64_MAX, 0, 0};
      return burst(stop + distance_);
    }
    prefetch = {cursor_ - begin, rows_, static_cast<uint64_t>(num_rows_), row_bytes_,
                straddles_ ? size_ - 1 : 0};
    cursor_ += count;
    return true;
  }

  // Rows to pool between two calls of `next`.
  int64_t stride() const { return 32; }

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
    distance_ = most(8, least(64, 8192 / (size_ + 1)));
  }
  // Validates and prefetches up to `target`, across features.
  __attribute__((noinline)) bool burst(int64_t target) {
    target = least(target, end_);
    while (cursor_ < target) {
      if (cursor_ >= feature_end_) {
        if (feature_[1].first_bag >= end_bag_) return false;
        enter(feature_ + 1);
        continue;
      }
      const int64_t stop = least(target, feature_end_);
      for (; cursor_ < stop; ++cursor_) {
        const int64_t id = request_.indices[cursor_];
        if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(num_rows_)) return false;
        const char* row = rows_ + id * row_bytes_;
        for (int64_t i = 0; i < size_; i += 64) prefetch(row + i);
        if (straddles_) prefetch(row + size_ - 1);
      }
    }
    return true;
  }

  const BagRequest& request_;
  int64_t end_bag_, cursor_, end_, feature_end_;
  const Feature* feature_;
  const char* rows_;
  int64_t num_rows_, row_bytes_, size_, distance_;
  bool straddles_;
};

}  // namespace mprec::MPREC_ISA
