#include "cache/distinct.h"

#include <vector>

namespace mprec {

int64_t distinct(const int64_t* ids, const int64_t* positions, int64_t n, int64_t* distinct_ids,
                 int64_t* inverse) {
  // Open addressing at a load of at most one half; slots hold 1 + the index of a distinct ID.
  thread_local std::vector<int64_t> slots;
  int bits = 4;
  while ((int64_t{1} << bits) < 2 * n) ++bits;
  const int64_t mask = (int64_t{1} << bits) - 1;
  slots.assign(mask + 1, 0);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = ids[positions[i]];
    int64_t slot = static_cast<int64_t>(static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15 >> (64 - bits));
    while (slots[slot] && distinct_ids[slots[slot] - 1] != id) slot = (slot + 1) & mask;
    if (!slots[slot]) {
      distinct_ids[count] = id;
      slots[slot] = ++count;
    }
    inverse[i] = slots[slot] - 1;
  }
  return count;
}

}  // namespace mprec
