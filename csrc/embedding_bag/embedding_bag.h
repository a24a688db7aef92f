// Pooled look-ups in embedding tables, many tables per call. README.md has the formula.
// Inline functions here are always inlined: the files compiled for an ISA must not leave copies for others.
#pragma once
#include <cstdint>

#include "bags/bags.h"
#include "rows/formats.h"

namespace mprec {

// A table and where its bags' results go. Its bags are [first_bag, first_bag of the next table).
struct PooledTable {
  const char* rows;
  int64_t num_rows, dim;
  int64_t row_bytes;  // from one row to the next
  int64_t first_bag;
  float* out;          // or what out_format says
  int64_t out_stride;  // elements from one bag's result to the next
  Format format = Format::f32, out_format = Format::f32;
};

struct PoolingRequest {
  Bags bags;
  const PooledTable* tables;  // one for each feature, then one whose first_bag is num_bags()
  // Bags are pooled in blocks of so many of each table, a block's tables in turn; the driver says.
  int64_t block_bags = 1;

  __attribute__((always_inline)) const PooledTable* end() const { return tables + bags.num_features; }
  // A table's first bag in a block: its bags there end where those in the next block begin.
  __attribute__((always_inline)) int64_t block_begin(const PooledTable& t, int64_t block) const {
    const int64_t bags = (&t)[1].first_bag - t.first_bag, before = block * block_bags;
    return t.first_bag + (before < bags ? before : bags);
  }
};

// Where the bags of a request, in the order in which they are pooled, may be cut in two: the later part
// begins with `bag`, one of the table's in the block.
struct Cut {
  int64_t block, table, bag;
};

// Writes every bag's result. IdError or OffsetsError (naming the first offender) if the indices or offsets
// are invalid; results are then unspecified, but nothing outside the tables has been read.
void embedding_bag_forward(const PoolingRequest&, int threads);

// Rough count of cache lines that a request touches: the measure by which work is split.
int64_t embedding_bag_cost(const PoolingRequest&);

struct EmbeddingBagKernels {
  // Pools the bags between two cuts; false if it met an invalid offset or ID. `scratch` holds one float32
  // result; null if every result is float32.
  bool (*forward)(const PoolingRequest&, const Cut& begin, const Cut& end, float* scratch);
};

}  // namespace mprec
