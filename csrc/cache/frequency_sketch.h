// How often was an ID seen lately? A count-min sketch of 4-bit counters whose four counters of one ID share a
// cache line, with ageing by halving.
#pragma once
#include <atomic>
#include <cstdint>

#include "arch/arch.h"

namespace mprec {

class FrequencySketch {
 public:
  static constexpr int max_count = 15;

  // A cache line: 8 words of 16 counters. Row r of the count-min sketch is words 2r and 2r + 1.
  struct alignas(64) Block {
    std::atomic<uint64_t> words[8];
  };

  // Does not own the blocks; they start as zeros.
  FrequencySketch(Block* blocks, int64_t count) : blocks_(blocks), count_(static_cast<uint64_t>(count)) {}

  int64_t size() const { return static_cast<int64_t>(count_); }

  // At most max_count, and never less than what was added since the last halvings, except that threads which
  // add at the same moment may lose a count. `hash`: 64 well-mixed bits of the ID.
  int estimate(uint64_t hash) const {
    const Block& block = block_of(hash);
    int least = max_count;
    for (int row = 0; row < 4; ++row) {
      const int count = block.words[word(hash, row)].load(std::memory_order_relaxed) >> shift(hash, row) & 15;
      if (count < least) least = count;
    }
    return least;
  }

  // Conservative update: only counters at the minimum grow.
  void add(uint64_t hash) { raise(hash, estimate(hash) + 1); }

  // Sees to it that the estimate is at least `count`.
  void raise(uint64_t hash, int count) {
    if (count > max_count) return;
    Block& block = block_of(hash);
    for (int row = 0; row < 4; ++row) {
      std::atomic<uint64_t>& w = block.words[word(hash, row)];
      const uint64_t old = w.load(std::memory_order_relaxed);
      const int s = shift(hash, row);
      if (static_cast<int>(old >> s & 15) < count)
        w.store((old & ~(uint64_t{15} << s)) | static_cast<uint64_t>(count) << s, std::memory_order_relaxed);
    }
  }

  void halve(int64_t block) {
    for (std::atomic<uint64_t>& w : blocks_[block].words)
      w.store(w.load(std::memory_order_relaxed) >> 1 & 0x7777777777777777, std::memory_order_relaxed);
  }

  void prefetch(uint64_t hash) const { mprec::prefetch(&block_of(hash)); }

 private:
  // The block comes from the hash's high half, the counters' places from 5 bits a row of its low half.
  Block& block_of(uint64_t hash) const { return blocks_[(hash >> 32) * count_ >> 32]; }
  static int word(uint64_t hash, int row) { return 2 * row + static_cast<int>(hash >> (5 * row) & 1); }
  static int shift(uint64_t hash, int row) { return static_cast<int>(hash >> (5 * row + 1) & 15) * 4; }

  Block* blocks_;
  uint64_t count_;
};

}  // namespace mprec
