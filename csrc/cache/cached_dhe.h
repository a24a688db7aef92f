// Deep hash embedding bags with a cache of rows before the decoder: a hit is a copy of the row that the
// decoder made, and only the distinct IDs among the misses are decoded.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "cache/codebook.h"
#include "cache/row_cache.h"
#include "dhe/bag.h"

namespace mprec {

struct CachedFeature {
  DecoderView decoder;
  RowCache* cache;        // null: every distinct ID is decoded
  uint32_t generation;    // the cache's for this decoder's weights
  int64_t position;       // of the feature in the batch
  int64_t column;         // of `out`
  CodebookView codebook;  // misses with a code get its row, approximate, and are not admitted; count 0: none
};

struct CachedDheCounters {
  std::atomic<uint64_t> calls{0}, coded{0}, decoded{0}, lookup_ns{0}, decode_ns{0};
};

// As dhe_bag_forward, for the features listed; the request describes all features of the batch. `admit`:
// offer decoded rows to the caches.
void cached_dhe_bag_forward(const DheRequest&, const std::vector<CachedFeature>& features, bool admit,
                            int threads, CachedDheCounters&);

}  // namespace mprec
