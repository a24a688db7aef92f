// Two walks over the same bags: the pooling's, and a cursor that runs ahead of it, validates each ID once and
// says which row to prefetch when.
#pragma once
#include "embedding_bag/embedding_bag.h"
#include "isa/isa.h"
#include "rows/rows.h"

namespace mprec::MPREC_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A table's bags [begin, end) in one block.
struct Segment {
  const PooledTable* table;
  int64_t begin, end;
};

// The segments between two cuts.
class Walk {
 public:
  Walk(const PoolingRequest& r, const Cut& from, const Cut& to)
      : request_(r), block_(from.block), table_(from.table), begin_(from.bag), to_(to) {}

  // The next segment with any bags; false after the last.
  bool next(Segment& s) {
    do {
      if (table_ == request_.bags.num_features) table_ = 0, ++block_;
      if (block_ > to_.block || (block_ == to_.block && table_ > to_.table)) return false;
      s.table = request_.tables + table_;
      s.begin = most(begin_, request_.block_begin(*s.table, block_));
      s.end = request_.block_begin(*s.table, block_ + 1);
      if (block_ == to_.block && table_ == to_.table) s.end = least(s.end, to_.bag);
      begin_ = 0;
      ++table_;
    } while (s.begin >= s.end);
    return true;
  }

 private:
  const PoolingRequest& request_;
  int64_t block_, table_, begin_;  // begin_: of the very first segment
  Cut to_;
};

// The index at which a bag begins, or the nearest there is: offsets are not validated yet.
inline int64_t clamped_begin(const Bags& b, int64_t bag) {
  return most(0, least(b.bag_begin(bag), b.indices.size));
}

// While row i is pooled, the ID at i + shift is to be validated and its row prefetched. Where there is
// nothing to look ahead for, that is row i itself, which is valid.
struct Prefetch {
  int64_t shift;
  const char* rows;
  uint64_t num_rows;
  int64_t row_bytes;
  int64_t last_byte;  // of a row, if it may lie in a cache line of its own; else 0
  // Whether the table stays in the L2 cache: wide rows then go on to L1. All others go to L2, to which more
  // lines can be on their way at once: on Zen 4 rows in memory come in half the time.
  bool in_l2;
};

class Lookahead {
 public:
  Lookahead(const PoolingRequest& r, const Cut& from, const Cut& to) : request_(r), walk_(r, from, to) {
    enter();
  }

  // What the pooling of the next `count` rows, from index `begin` on, is to prefetch: as many rows further
  // ahead. One for each row that is pooled, because a burst of prefetches blocks the queue to memory. Of many
  // rows the later ones are validated while the earlier ones are pooled. False at an invalid ID.
  bool next(int64_t begin, int64_t count, Prefetch& prefetch) {
    if (lead_ < distance_ && !burst(distance_)) return false;
    if (cursor_ + count > end_) {  // the rows of several segments, or the last of all
      prefetch = {0, rows_, UINT64_MAX, 0, 0, false};
      if (!burst(count + distance_) || lead_ < count) return false;
      lead_ -= count;
      return true;
    }
    prefetch = {
        cursor_ - begin, rows_, static_cast<uint64_t>(num_rows_), row_bytes_, straddles_ ? size_ - 1 : 0,
        in_l2_};
    cursor_ += count;
    return true;
  }

  // Rows to pool between two calls of `next`: no more than the cursor's segment has left, so that it need
  // not burst.
  int64_t stride() {
    if (cursor_ == end_) enter();
    return cursor_ < end_ ? least(64, end_ - cursor_) : 64;
  }

 private:
  // Rows lie in pages of their own: twice as many are more than the first level of address translations
  // holds (64 to 96 pages), and took a fifth longer.
  static constexpr int64_t most_ahead = 32;
  static constexpr int64_t l2_bytes = 1 << 19;

  // The next segment with any indices, if there is one.
  void enter() {
    for (Segment s; cursor_ >= end_ && walk_.next(s);) {
      cursor_ = clamped_begin(request_.bags, s.begin);
      end_ = most(cursor_, clamped_begin(request_.bags, s.end));
      const PooledTable& t = *s.table;
      rows_ = t.rows;
      num_rows_ = t.num_rows;
      row_bytes_ = t.row_bytes;
      size_ = row_size(t.format, t.dim);
      straddles_ = row_bytes_ % 64 != 0 || reinterpret_cast<uintptr_t>(rows_) % 64 != 0;
      in_l2_ = num_rows_ <= l2_bytes / (row_bytes_ + 1);
      distance_ = most(8, least(most_ahead, 8192 / (size_ + 1)));
    }
  }
  // Validates and prefetches until `target` rows lie ahead, across segments.
  __attribute__((noinline)) bool burst(int64_t target) {
    while (lead_ < target) {
      if (cursor_ == end_) enter();
      const int64_t stop = least(end_, cursor_ + target - lead_);
      if (cursor_ == stop) return true;  // that was the last
      lead_ += stop - cursor_;
      for (; cursor_ < stop; ++cursor_) {
        const int64_t id = request_.bags.indices[cursor_];
        if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(num_rows_)) return false;
        const char* row = rows_ + id * row_bytes_;
        for (int64_t i = 0; i < size_; i += 64) prefetch_l2(row + i);
        if (straddles_) prefetch_l2(row + size_ - 1);
      }
    }
    return true;
  }

  const PoolingRequest& request_;
  Walk walk_;
  int64_t cursor_ = 0, end_ = 0;  // indices of the cursor's segment
  int64_t lead_ = 0;              // rows validated and not yet pooled
  const char* rows_ = nullptr;
  int64_t num_rows_ = 0, row_bytes_ = 0, size_ = 0, distance_ = 8;
  bool straddles_ = false, in_l2_ = false;
};

}  // namespace mprec::MPREC_ISA
