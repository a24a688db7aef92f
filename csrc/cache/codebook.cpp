#include "cache/codebook.h"

#include <algorithm>

#include "arch/arch.h"

namespace mprec {

void codebook_rows(const CodebookView& b, const int64_t* ids, const int64_t* positions, int64_t n, float* out,
                   int64_t stride) {
  constexpr int64_t ahead = 16;  // centroids stay in cache, codes do not
  const auto position = [&](int64_t i) { return positions ? positions[i] : i; };
  for (int64_t i = 0; i < std::min(n, ahead); ++i) prefetch(b.codes + ids[position(i)] * b.stages);
  for (int64_t i = 0; i < n; ++i) {
    if (i + ahead < n) prefetch(b.codes + ids[position(i + ahead)] * b.stages);
    const int64_t at = position(i);
    const uint8_t* code = b.codes + ids[at] * b.stages;
    float* to = out + at * stride;
    const float* first = b.centroids + code[0] * b.dim;
    for (int64_t j = 0; j < b.dim; ++j) to[j] = first[j];
    for (int s = 1; s < b.stages; ++s) {
      const float* c = b.centroids + (int64_t{256} * s + code[s]) * b.dim;
      for (int64_t j = 0; j < b.dim; ++j) to[j] += c[j];
    }
  }
}

}  // namespace mprec
