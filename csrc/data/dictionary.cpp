#include "data/dictionary.h"

#include <algorithm>
#include <cstring>

namespace mprec {
namespace {

constexpr uint32_t no_code = 0xffffffffu;
constexpr int64_t block = 64;

struct Slot {
  uint32_t value, code;
};

class Slots {
 public:
  Slots() : slots_(1 << 10, Slot{0, no_code}), shift_(64 - 10) {}

  size_t home(uint32_t value) const { return value * 0x9E3779B97F4A7C15u >> shift_; }
  void fetch(uint32_t value) const { __builtin_prefetch(&slots_[home(value)]); }

  // The value's code, `next` if it is new.
  uint32_t code(uint32_t value, uint32_t next) {
    const size_t mask = slots_.size() - 1;
    for (size_t i = home(value);; i = (i + 1) & mask) {
      Slot& slot = slots_[i];
      if (slot.code == no_code) {
        slot = {value, next};
        if (2 * ++used_ > slots_.size()) grow();
        return next;
      }
      if (slot.value == value) return slot.code;
    }
  }

 private:
  void grow() {
    std::vector<Slot> old(slots_.size() * 2, Slot{0, no_code});
    old.swap(slots_);
    --shift_;
    const size_t mask = slots_.size() - 1;
    for (const Slot& slot : old) {
      if (slot.code == no_code) continue;
      size_t i = home(slot.value);
      while (slots_[i].code != no_code) i = (i + 1) & mask;
      slots_[i] = slot;
    }
  }

  std::vector<Slot> slots_;
  size_t used_ = 0;
  int shift_;
};

uint64_t mix(uint64_t lane, uint64_t word) {
  lane += word * 0xC2B2AE3D27D4EB4Fu;
  return (lane << 31 | lane >> 33) * 0x9E3779B185EBCA87u;
}

}  // namespace

void encode_values(uint32_t* values, const uint32_t* missing, int bit, int64_t n, int64_t counted,
                   std::vector<int64_t>& distinct, std::vector<int64_t>& counts) {
  Slots slots;
  uint32_t missing_code = no_code;
  auto add = [&](int64_t value) {
    distinct.push_back(value);
    counts.push_back(0);
    return static_cast<uint32_t>(distinct.size() - 1);
  };
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = std::min(begin + block, n);
    for (int64_t i = begin; i < end; ++i) slots.fetch(values[i]);
    for (int64_t i = begin; i < end; ++i) {
      uint32_t code;
      if (missing && missing[i] >> bit & 1) {
        if (missing_code == no_code) missing_code = add(-1);
        code = missing_code;
      } else {
        const auto next = static_cast<uint32_t>(distinct.size());
        code = slots.code(values[i], next);
        if (code == next) add(values[i]);
      }
      counts[code] += i < counted;
      values[i] = code;
    }
  }
}

uint64_t checksum(const void* data, int64_t bytes) {
  constexpr int lanes = 4;
  uint64_t lane[lanes] = {1, 2, 3, 4};
  const auto* at = static_cast<const unsigned char*>(data);
  int64_t left = bytes;
  for (; left >= 8 * lanes; left -= 8 * lanes, at += 8 * lanes) {
    uint64_t words[lanes];
    std::memcpy(words, at, sizeof words);
    for (int i = 0; i < lanes; ++i) lane[i] = mix(lane[i], words[i]);
  }
  unsigned char rest[8 * lanes] = {};
  if (left) std::memcpy(rest, at, left);
  uint64_t sum = static_cast<uint64_t>(bytes);
  for (int i = 0; i < lanes; ++i) {
    uint64_t word;
    std::memcpy(&word, rest + 8 * i, sizeof word);
    sum = mix(sum, mix(lane[i], word));
  }
  return sum;
}

}  // namespace mprec
