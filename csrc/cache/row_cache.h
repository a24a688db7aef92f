// A cache of embedding rows by ID, for many readers and writers at once. README.md has the design.
#pragma once
#include <atomic>
#include <cstdint>

#include "cache/frequency_sketch.h"
#include "common/aligned.h"

namespace mprec {

struct RowCacheStats {
  uint64_t hits, misses;  // look-ups, one for each ID asked for
  uint64_t admissions;    // rows stored, by admit and fill
  uint64_t evictions;     // of those, the ones that took another row's place
  uint64_t rejections;    // rows that admit turned away: too rarely seen, or computed for a past generation
};

class RowCache {
 public:
  static constexpr int ways = 6;

  // Rows of `dim` floats in at most `budget` bytes, everything counted (this object too).
  // std::invalid_argument if dim is not in [1, 2^20] or the budget does not hold `ways` rows.
  RowCache(int64_t dim, int64_t budget);

  // The least budget that gives room for `rows` rows.
  static int64_t bytes_for(int64_t dim, int64_t rows);

  int64_t dim() const { return dim_; }
  int64_t capacity() const { return num_groups_ * ways; }
  int64_t nbytes() const { return nbytes_; }
  int64_t size() const;  // rows held, counted group by group
  RowCacheStats stats() const;
  void reset_stats();

  // Rows stored under one generation are invisible under every other.
  uint32_t generation() const { return generation_.load(std::memory_order_acquire); }
  // Forgets every row, in constant time, and returns the new generation.
  uint32_t invalidate() { return generation_.fetch_add(1, std::memory_order_acq_rel) + 1; }

  // Copies the rows of ids[i] that are held under `generation` to out + i * stride (floats), writes the
  // other positions i, ascending, to `misses` (room for n) and returns their number. The output of a miss is
  // unspecified. A row that another thread is replacing at this moment may count as a miss.
  int64_t lookup(const int64_t* ids, int64_t n, uint32_t generation, float* out, int64_t stride,
                 int64_t* misses);

  // Offers row[i * stride] as the row of ids[i] under `generation`. It is stored if its place is free or if
  // its ID was looked up more often than one of the rows in its place. Returns how many were stored.
  int64_t admit(const int64_t* ids, int64_t n, uint32_t generation, const float* rows, int64_t stride);

  // As admit, for the IDs known to be the most frequent, first things first: a row is stored while its place
  // has room (or holds it already), and is kept until lookups show it to be rare.
  int64_t fill(const int64_t* ids, int64_t n, uint32_t generation, const float* rows, int64_t stride);

  // Writes up to `room` of the IDs held under `generation`, in no order, and returns how many are held.
  int64_t ids(uint32_t generation, int64_t* out, int64_t room) const;

 private:
  // A cache line. `state` is generation << 32 | sequence; the sequence is odd while the group is written.
  // `frequency` holds a byte for each way.
  struct alignas(64) Group {
    std::atomic<uint64_t> state, frequency;
    std::atomic<int64_t> keys[ways];
  };
  static_assert(sizeof(Group) == 64);
  struct Place;
  struct Lock;
  struct alignas(64) Counters {
    std::atomic<uint64_t> hits, misses, admissions, evictions, rejections, events;
  };
  struct Layout;

  static Layout layout(int64_t dim, int64_t groups);
  Group& group(uint32_t hash_half) const {
    return groups_[hash_half * static_cast<uint64_t>(num_groups_) >> 32];
  }
  float* row(const Group& g, int way) const { return rows_ + ((&g - groups_) * ways + way) * dim_; }
  Place find(int64_t id, uint64_t hash, uint32_t generation) const;
  bool take(const Place& place, float* out) const;
  enum class Outcome { rejected, stored, replaced, present };
  bool may_enter(const Group& g, int64_t id, uint32_t generation, uint64_t candidate) const;
  Outcome store(int64_t id, uint32_t generation, const float* row, bool hot);
  int64_t store_all(const int64_t* ids, int64_t n, uint32_t generation, const float* rows, int64_t stride,
                    bool hot);
  static void set_frequency(Group& g, int way, uint64_t value);
  void age(int64_t events);

  int64_t dim_, num_groups_, nbytes_;
  AlignedBuffer<char> memory_;  // groups, then the sketch's blocks, then the rows
  Group* groups_;
  float* rows_;
  FrequencySketch sketch_;
  std::atomic<uint32_t> generation_{0};
  mutable Counters counters_{};
};

}  // namespace mprec
