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
  Mode mode;        // sum or mean
  TableStage rows;  // one for each of `ids`, in their order
  std::variant<TableStage, DecoderStage>
      rest;  // of `rows` and `rest` the program sets feature, part and mode
};

// Decoders behind caches of rows, which one call serves: as cached_dhe_bag_forward, whose counters count on.
struct CachedStage {
  std::vector<CachedFeature> features;  // the program sets `column`
  std::vector<int64_t> parts;           // of each
  Mode mode;
  bool admit;
  CachedDheCounters* counters;
};

}  // namespace mprec
