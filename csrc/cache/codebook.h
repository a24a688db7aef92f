// Rows by code: row i is the sum over stages s of centroids[256 s + codes[i, s]].
#pragma once
#include <cstdint>

namespace mprec {

struct CodebookView {
  const uint8_t* codes;  // [count, stages]
  int64_t count;
  int stages;
  const float* centroids;  // [256 * stages, dim]
  int64_t dim;
  bool has(int64_t i) const { return i < count; }
};

// Row ids[positions[i]] into out + positions[i] * stride; positions null: ids[i] into out + i * stride. All
// that are asked for must be there, 0 <= id < count.
void codebook_rows(const CodebookView&, const int64_t* ids, const int64_t* positions, int64_t n, float* out,
                   int64_t stride);

}  // namespace mprec
