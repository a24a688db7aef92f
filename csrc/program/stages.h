// What a program is made of. Stages make vectors of `dim` numbers: of each sample one `part`, pooled from the
// bag of `feature`. None owns rows, decoders or caches.
#pragma once
#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "bags/bags.h"
#include "cache/cached_dhe.h"
#include "dhe/dhe.h"
#include "program/hot_ids.h"
#include "rows/formats.h"

namespace mprec {

// Which bags a stage pools: those of the batch, or halves of those of a feature with hot rows (halves.h).
enum class BagsOf { batch, hot, rest };
constexpr int kinds_of_bags = 3;

// What a table's pooled rows are codes of: vectors are codes @ matrix + bias, for each row of the bag.
struct Projection {
  int rank;
  std::vector<float> matrix;  // [rank][dim]
  std::vector<float> bias;    // [dim], or none
};

// Rows may be several vectors long: then they are that part and the next ones.
struct TableStage {
  const char* rows;
  int64_t num_rows, row_bytes;
  Format format;
  int64_t feature, part;
  Mode mode;
  int vectors = 1;                       // of a row
  std::optional<Projection> projection;  // rows are `rank` long
  BagsOf bags = BagsOf::batch;           // else `feature` is the number of a stage of hot rows
};

struct DecoderStage {
  DecoderView decoder;
  int64_t feature, part;
  Mode mode;
  BagsOf bags = BagsOf::batch;
};

// Rows of the most frequent IDs, over a rest that serves all others. Sums of both are added, and divided for
// a mean.
struct HotStage {
  HotIds ids;
  int64_t feature, part;
  Mode mode;  // sum or mean
  // Of these the program sets feature, part and mode. A row for each of `ids`, in their order.
  TableStage rows;
  std::variant<TableStage, DecoderStage> rest;
};

// Decoders behind caches of rows, which one call serves: as cached_dhe_bag_forward, whose counters count on.
struct CachedStage {
  std::vector<CachedFeature> features;  // the program sets `column`
  std::vector<int64_t> parts;           // of each
  Mode mode;
  bool admit;
  CachedDheCounters* counters;
};

// Stands before the other stages of a feature (unseen.h).
struct UnseenStage {
  int64_t feature, part;    // the first part of the feature
  std::vector<bool> known;  // of each ID; those beyond are unseen
  int64_t proxy;            // looked up for an unseen ID
  bool averaged;            // does the feature pool by the mean?
  // Of all parts of the feature: the mean of the vectors of known IDs, less the proxy's.
  std::vector<float> correction;

  bool is_known(int64_t id) const { return id < static_cast<int64_t>(known.size()) && known[id]; }
};

}  // namespace mprec
