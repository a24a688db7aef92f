#include "cache/row_cache.h"

#include <algorithm>
#include <new>
#include <optional>
#include <stdexcept>
#include <thread>

#include "arch/arch.h"
#include "common/error.h"

namespace mprec {
namespace {

constexpr int64_t max_dim = int64_t{1} << 20;
constexpr int64_t max_groups = (int64_t{1} << 32) - 1;  // a group is chosen by 32 bits of hash
constexpr int64_t empty = -1;
constexpr uint64_t max_frequency = FrequencySketch::max_count;
// Every frequency is halved once in so many look-ups for each row of capacity.
constexpr int64_t ageing_lookups = 32;
// A reader waits so many pauses for a writer before it takes the row for missing: a write takes fewer, unless
// the writer has lost its processor.
constexpr int reader_patience = 32;

uint64_t mix(int64_t id) {  // MurmurHash3's finaliser: every bit depends on every bit
  uint64_t h = static_cast<uint64_t>(id);
  h = (h ^ h >> 33) * 0xff51afd7ed558ccd;
  h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53;
  return h ^ h >> 33;
}
uint32_t first_half(uint64_t hash) { return static_cast<uint32_t>(hash); }
uint32_t second_half(uint64_t hash) { return static_cast<uint32_t>(hash >> 32); }

uint32_t generation_of(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
bool busy(uint64_t state) { return state & 1; }

// A row may change while it is copied; the group's sequence number tells afterwards. Volatile, so that each
// float is read once and none is read after the sequence number has been.
using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

__attribute__((no_sanitize("thread"))) void copy_out(const float* from, float* to, int64_t dim) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 4 <= dim; i += 4)
    *reinterpret_cast<Four*>(to + i) = *reinterpret_cast<const volatile Four*>(from + i);
  for (; i < dim; ++i) to[i] = *const_cast<const volatile float*>(from + i);
}

__attribute__((no_sanitize("thread"))) void copy_in(const float* from, float* to, int64_t dim) {
  int64_t i = 0;
  for (; i + 4 <= dim; i += 4)
    *reinterpret_cast<volatile Four*>(to + i) = *reinterpret_cast<const Four*>(from + i);
  for (; i < dim; ++i) *const_cast<volatile float*>(to + i) = from[i];
}

// The first `bytes` of a row; behind some cache lines the hardware follows by itself.
inline void prefetch_row(const float* row, int64_t bytes) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}
constexpr int64_t prefetched_bytes = 512;

// Bit w: keys[w] is `id`. Reads keys that may be written meanwhile, as copy_out does.
template <int count>
__attribute__((no_sanitize("thread"))) inline unsigned matches(const std::atomic<int64_t> (&keys)[count],
                                                               int64_t id) {
  static_assert(count % 2 == 0);
  unsigned found = 0;
#pragma GCC unroll 8
  for (int way = 0; way < count; way += 2) found |= equal_pair(keys + way, id) << way;
  return found;
}

}  // namespace

struct RowCache::Layout {
  int64_t sketch_at, rows_at, bytes;  // bytes: of the allocation
};

RowCache::Layout RowCache::layout(int64_t dim, int64_t groups) {
  Layout l;
  l.sketch_at = groups * static_cast<int64_t>(sizeof(Group));
  // A block of the sketch, 128 counters, for each group of 6 rows: half as many cost a point of hit rate.
  l.rows_at = l.sketch_at + groups * static_cast<int64_t>(sizeof(FrequencySketch::Block));
  l.bytes = l.rows_at + groups * ways * dim * static_cast<int64_t>(sizeof(float));
  return l;
}

int64_t RowCache::bytes_for(int64_t dim, int64_t rows) {
  if (dim < 1 || dim > max_dim)
    throw std::invalid_argument(message("dim: expected 1 to ", max_dim, ", got ", dim));
  if (rows < 1 || rows > max_groups * ways)
    throw std::invalid_argument(message("rows: expected 1 to ", max_groups * ways, ", got ", rows));
  return static_cast<int64_t>(sizeof(RowCache)) + layout(dim, (rows + ways - 1) / ways).bytes;  // < 2^58
}

RowCache::RowCache(int64_t dim, int64_t budget) : dim_(dim), sketch_(nullptr, 0) {
  const int64_t least = bytes_for(dim, 1);
  if (budget < least)
    throw std::invalid_argument(
        message("nbytes: ", budget, " is less than ", least, ", the least for dim ", dim));
  const int64_t room = budget - static_cast<int64_t>(sizeof(RowCache));
  num_groups_ = std::min(max_groups, room / layout(dim, 1).bytes);
  const Layout l = layout(dim, num_groups_);
  nbytes_ = static_cast<int64_t>(sizeof(RowCache)) + l.bytes;

  memory_ = AlignedBuffer<char>(l.bytes);
  char* base = memory_.data();
  groups_ = reinterpret_cast<Group*>(base);
  auto* blocks = reinterpret_cast<FrequencySketch::Block*>(base + l.sketch_at);
  rows_ = reinterpret_cast<float*>(base + l.rows_at);
  for (int64_t g = 0; g < num_groups_; ++g) {
    new (groups_ + g) Group{};
    for (auto& key : groups_[g].keys) key.store(empty, std::memory_order_relaxed);
    new (blocks + g) FrequencySketch::Block{};
  }
  sketch_ = FrequencySketch(blocks, num_groups_);
}

struct RowCache::Place {
  Group* group;
  uint64_t state;  // under which the ID was found
  int way;
};

// ---- reading

inline RowCache::Place RowCache::find(int64_t id, uint64_t hash, uint32_t generation) const {
  // Both groups at once and without branches: which of the two holds an ID cannot be predicted.
  Group* const groups[2] = {&group(first_half(hash)), &group(second_half(hash))};
  uint64_t state[2];
  unsigned match[2];
  for (int g = 0; g < 2; ++g) {
    state[g] = groups[g]->state.load(std::memory_order_acquire);
    for (int i = 0; __builtin_expect(busy(state[g]), 0) && i < reader_patience; ++i) {
      spin_pause();
      state[g] = groups[g]->state.load(std::memory_order_acquire);
    }
    match[g] = matches(groups[g]->keys, id);
    if (__builtin_expect(generation_of(state[g]) != generation || busy(state[g]), 0)) match[g] = 0;
  }
  if (!(match[0] | match[1])) return {nullptr, 0, 0};
  const int second = match[0] == 0;
  return {groups[second], state[second], __builtin_ctz(match[second])};
}

// True if the row was copied whole; counts the use.
inline bool RowCache::take(const Place& place, float* out) const {
  Group& g = *place.group;
  copy_out(row(g, place.way), out, dim_);
  std::atomic_thread_fence(std::memory_order_acquire);
  if (g.state.load(std::memory_order_relaxed) != place.state) return false;
  const uint64_t frequency = g.frequency.load(std::memory_order_relaxed);
  if ((frequency >> (8 * place.way) & 255) < max_frequency)
    g.frequency.store(frequency + (uint64_t{1} << (8 * place.way)), std::memory_order_relaxed);
  return true;
}

int64_t RowCache::lookup(const int64_t* ids, int64_t n, uint32_t generation, float* out, int64_t stride,
                         int64_t* misses) {
  // Memory latency is hidden by going over a block of IDs three times: groups, rows, copies.
  constexpr int block = 32;
  const int64_t row_bytes = std::min(prefetched_bytes, dim_ * static_cast<int64_t>(sizeof(float)));
  int64_t missing = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int count = static_cast<int>(std::min<int64_t>(block, n - begin));
    uint64_t hash[block];
    Place place[block];
    for (int i = 0; i < count; ++i) {
      hash[i] = mix(ids[begin + i]);
      prefetch(&group(first_half(hash[i])));
      prefetch(&group(second_half(hash[i])));
    }
    for (int i = 0; i < count; ++i) {
      place[i] = find(ids[begin + i], hash[i], generation);
      if (place[i].group)
        prefetch_row(row(*place[i].group, place[i].way), row_bytes);
      else
        sketch_.prefetch(hash[i]);
    }
    for (int i = 0; i < count; ++i) {
      if (place[i].group && take(place[i], out + (begin + i) * stride)) continue;
      sketch_.add(hash[i]);
      misses[missing++] = begin + i;
    }
  }
  counters_.hits.fetch_add(n - missing, std::memory_order_relaxed);
  if (missing) counters_.misses.fetch_add(missing, std::memory_order_relaxed);
  age(n);
  return missing;
}

void RowCache::age(int64_t events) {
  // A hand goes round the groups and the sketch's blocks, one of each for `ways` rows of capacity, and halves
  // what it passes. Threads take disjoint stretches of its way.
  constexpr uint64_t lookups_per_unit = ageing_lookups * ways / 2;
  const uint64_t units = 2 * static_cast<uint64_t>(num_groups_);
  const uint64_t before = counters_.events.fetch_add(events, std::memory_order_relaxed);
  const uint64_t last = (before + events) / lookups_per_unit;
  for (uint64_t hand = before / lookups_per_unit; hand < last; ++hand) {
    const int64_t unit = static_cast<int64_t>(hand % units);
    if (unit < num_groups_) {
      std::atomic<uint64_t>& frequency = groups_[unit].frequency;
      frequency.store(frequency.load(std::memory_order_relaxed) >> 1 & 0x7f7f7f7f7f7f7f7f,
                      std::memory_order_relaxed);
    } else {
      sketch_.halve(unit - num_groups_);
    }
  }
}

// ---- writing

// A group that one writer owns. Readers see the odd sequence number and wait, or look elsewhere.
struct RowCache::Lock {
  Group& group;
  uint64_t state;  // even
  bool changed = false;

  explicit Lock(Group& g) : group(g) {
    for (int i = 1;; ++i) {
      state = g.state.load(std::memory_order_relaxed);
      if (!busy(state) && g.state.compare_exchange_weak(state, state | 1, std::memory_order_acquire)) break;
      // The owner may have lost its processor.
      if (i % 64 == 0)
        std::this_thread::yield();
      else
        spin_pause();
    }
    std::atomic_thread_fence(std::memory_order_release);  // the odd number is seen before what is written
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  ~Lock() { group.state.store(changed ? state + 2 : state, std::memory_order_release); }

  // Makes the group one of `generation`; false if it is of a later one.
  bool enter(uint32_t generation) {
    const int32_t ahead = static_cast<int32_t>(generation_of(state) - generation);
    if (ahead > 0) return false;
    if (ahead < 0) {
      for (auto& key : group.keys) key.store(empty, std::memory_order_relaxed);
      group.frequency.store(0, std::memory_order_relaxed);
      state = uint64_t{generation} << 32 | static_cast<uint32_t>(state);
      changed = true;
    }
    return true;
  }
};

// False only if store() would find no place for it. Most newcomers to a full cache are turned away, and this
// look takes no lock and writes no cache line.
inline bool RowCache::may_enter(const Group& g, int64_t id, uint32_t generation, uint64_t candidate) const {
  if (generation_of(g.state.load(std::memory_order_relaxed)) != generation) return true;
  const uint64_t frequency = g.frequency.load(std::memory_order_relaxed);
  for (int way = 0; way < ways; ++way) {
    const int64_t key = g.keys[way].load(std::memory_order_relaxed);
    if (key == empty || key == id || candidate > (frequency >> (8 * way) & 255)) return true;
  }
  return false;
}

RowCache::Outcome RowCache::store(int64_t id, uint32_t generation, const float* values, bool hot) {
  const uint64_t hash = mix(id);
  Group* groups[2] = {&group(first_half(hash)), &group(second_half(hash))};
  if (groups[0] > groups[1]) std::swap(groups[0], groups[1]);  // all writers lock in one order
  const int count = groups[0] == groups[1] ? 1 : 2;
  // Read before the locks are taken: whoever spins meanwhile should not wait for memory.
  const uint64_t candidate = hot ? max_frequency : static_cast<uint64_t>(sketch_.estimate(hash));

  if (!hot && !may_enter(*groups[0], id, generation, candidate) &&
      !may_enter(*groups[1], id, generation, candidate))
    return Outcome::rejected;

  Lock first(*groups[0]);
  std::optional<Lock> second;
  if (count == 2) second.emplace(*groups[1]);
  Lock* locks[2] = {&first, second ? &*second : nullptr};
  for (int i = 0; i < count; ++i)
    if (!locks[i]->enter(generation)) return Outcome::rejected;

  // The least used way of both groups; free ones come first, those of the emptier group before the others.
  Lock* place = nullptr;
  int place_way = 0;
  uint64_t least = UINT64_MAX;
  int64_t victim = empty;
  int most_free = 0;
  for (int i = 0; i < count; ++i) {
    Group& g = locks[i]->group;
    const uint64_t frequency = g.frequency.load(std::memory_order_relaxed);
    int free_ways = 0, free_way = 0;
    for (int way = 0; way < ways; ++way) {
      const int64_t key = g.keys[way].load(std::memory_order_relaxed);
      const uint64_t used = frequency >> (8 * way) & 255;
      if (key == id) {
        if (hot) set_frequency(g, way, max_frequency);
        return Outcome::present;
      }
      if (key == empty) {
        ++free_ways;
        free_way = way;
      } else if (used < least && most_free == 0) {
        least = used;
        place = locks[i];
        place_way = way;
        victim = key;
      }
    }
    if (free_ways > most_free) {
      most_free = free_ways;
      place = locks[i];
      place_way = free_way;
      victim = empty;
    }
  }
  if (victim != empty) {
    if (hot || candidate <= least) return Outcome::rejected;
    sketch_.raise(mix(victim), static_cast<int>(least));  // should it come back, it is not a stranger
  }
  Group& g = place->group;
  place->changed = true;
  g.keys[place_way].store(id, std::memory_order_relaxed);
  set_frequency(g, place_way, candidate);
  copy_in(values, row(g, place_way), dim_);
  return victim == empty ? Outcome::stored : Outcome::replaced;
}

void RowCache::set_frequency(Group& g, int way, uint64_t value) {
  const uint64_t others = g.frequency.load(std::memory_order_relaxed) & ~(uint64_t{255} << (8 * way));
  g.frequency.store(others | value << (8 * way), std::memory_order_relaxed);
}

int64_t RowCache::store_all(const int64_t* ids, int64_t n, uint32_t generation, const float* rows,
                            int64_t stride, bool hot) {
  int64_t stored = 0, replaced = 0, rejected = 0;
  if (generation != this->generation()) {
    rejected = n;
  } else {
    for (int64_t i = 0; i < n; ++i) switch (store(ids[i], generation, rows + i * stride, hot)) {
        case Outcome::replaced: ++replaced; [[fallthrough]];
        case Outcome::stored: ++stored; break;
        case Outcome::rejected: ++rejected; break;
        case Outcome::present: break;
      }
  }
  counters_.admissions.fetch_add(stored, std::memory_order_relaxed);
  counters_.evictions.fetch_add(replaced, std::memory_order_relaxed);
  counters_.rejections.fetch_add(rejected, std::memory_order_relaxed);
  return stored;
}

int64_t RowCache::admit(const int64_t* ids, int64_t n, uint32_t generation, const float* rows,
                        int64_t stride) {
  return store_all(ids, n, generation, rows, stride, false);
}

int64_t RowCache::fill(const int64_t* ids, int64_t n, uint32_t generation, const float* rows,
                       int64_t stride) {
  return store_all(ids, n, generation, rows, stride, true);
}

// ---- what it holds

int64_t RowCache::ids(uint32_t generation, int64_t* out, int64_t room) const {
  int64_t found = 0;
  for (int64_t i = 0; i < num_groups_; ++i) {
    const Group& g = groups_[i];
    int64_t keys[ways];
    uint64_t state;
    do {
      while (busy(state = g.state.load(std::memory_order_acquire))) std::this_thread::yield();
      for (int way = 0; way < ways; ++way) keys[way] = g.keys[way].load(std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_acquire);
    } while (g.state.load(std::memory_order_relaxed) != state);
    if (generation_of(state) != generation) continue;
    for (const int64_t key : keys) {
      if (key == empty) continue;
      if (found < room) out[found] = key;
      ++found;
    }
  }
  return found;
}

int64_t RowCache::size() const { return ids(generation(), nullptr, 0); }

RowCacheStats RowCache::stats() const {
  const auto get = [](const std::atomic<uint64_t>& c) { return c.load(std::memory_order_relaxed); };
  return {get(counters_.hits), get(counters_.misses), get(counters_.admissions), get(counters_.evictions),
          get(counters_.rejections)};
}

void RowCache::reset_stats() {
  for (auto* c : {&counters_.hits, &counters_.misses, &counters_.admissions, &counters_.evictions,
                  &counters_.rejections})
    c->store(0, std::memory_order_relaxed);
}

}  // namespace mprec
