// A query's body in JSON, read in one pass: {"ids": [[...], ...], "dense": [[...], ...], "sla_ms": 10}.
//
// A general parser makes an object of every number; at 128 samples of 26 IDs that is most of what a server
// does. This one knows what it looks for and takes nothing else: for whatever is wrong or out of the ordinary
// it gives up, and a general parser then says what it is.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace mprec {

struct QueryShape {
  const int64_t* vocabularies;  // an ID of feature t is in [0, vocabularies[t])
  int64_t features, num_dense, max_samples, max_ids;
};

struct Query {
  int64_t samples = 0;
  std::vector<int64_t> ids;      // sample by sample, and within one feature by feature
  std::vector<int64_t> lengths;  // of the bags, in that order; empty if each has one ID
  std::vector<float> dense;      // a row for each sample
  double sla_ms = 0;             // 0 if there is none
};

// Reads the whole body, which must have a zero byte behind it. False if it is not a query of this shape or
// not in the common form (keys once each and without escapes, no null); `out` then means nothing. Numbers
// become the doubles that are nearest, and the float32 nearest to these.
bool read_query(std::string_view body, const QueryShape& shape, Query& out);

// Writes the IDs feature by feature: `ids` has query.ids.size() places, `offsets` features * samples + 1.
void write_bags(const Query& query, int64_t features, int64_t* ids, int64_t* offsets);

}  // namespace mprec
