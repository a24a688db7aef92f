// One OpenMP region per operator call.
#pragma once
#include <omp.h>

#include <cstdint>

namespace mprec {

// Runs body(begin, end) over [0, n) in `threads` contiguous, nearly equal parts; in the calling thread
// when one part is enough. The split depends on n and `threads` only, so results do not vary by run.
template <class Body>
void parallel_ranges(int64_t n, int threads, const Body& body) {
  if (n < threads) threads = static_cast<int>(n);
  if (threads <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    if (begin < end) body(begin, end);
  }
}

}  // namespace mprec
