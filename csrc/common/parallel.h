// A call's work, shared among threads: parts that each thread takes one by one. README.md beside this file
// says why so, and not by regions with barriers.
#pragma once
#include <cstdint>

namespace mprec {

// Runs part(body, i, slot) for every i in [0, parts): in the calling thread and as many as threads - 1
// helpers.
void run_parts(int64_t parts, int threads, void (*part)(const void* body, int64_t i, int slot),
               const void* body);

// Runs body(i, slot) for every i in [0, parts), in any order. Two bodies that run at the same time have
// different slots, below `threads`: for memory of a thread's own. Returns when all are done; what a body
// throws is thrown here.
template <class Body>
void parallel_parts(int64_t parts, int threads, const Body& body) {
  if (threads <= 1 || parts <= 1) {
    for (int64_t i = 0; i < parts; ++i) body(i, 0);
    return;
  }
  run_parts(
      parts, threads, [](const void* of, int64_t i, int slot) { (*static_cast<const Body*>(of))(i, slot); },
      &body);
}

// Runs body(begin, end) over [0, n) in `ranges` contiguous, nearly equal parts, by as many threads. The split
// depends on n and `ranges` only, so results do not vary by run.
template <class Body>
void parallel_ranges(int64_t n, int ranges, const Body& body) {
  const int64_t parts = n < ranges ? n : ranges;
  parallel_parts(parts, static_cast<int>(parts), [&](int64_t i, int) {
    const int64_t begin = n * i / parts, end = n * (i + 1) / parts;
    body(begin, end);
  });
}

}  // namespace mprec
