// A report of named cases, one line each, and reproducible random numbers.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>

#include "common/error.h"

namespace mprec::test {

// A case prints its name when it begins, so that a crash is seen beside it, and its verdict when it ends.
class Case {
 public:
  explicit Case(const std::string& name);
  ~Case();
  Case(const Case&) = delete;

  template <class... Where>
  void expect(bool holds, const Where&... where) {
    ++checks_;
    if (!holds && failures_++ == 0) first_failure_ = message("", where...);
  }

  // |got - want| <= bound, where a NaN is only close to a NaN.
  template <class... Where>
  void close(double got, double want, double bound, const Where&... where) {
    const double error = std::fabs(got - want);
    const bool holds = std::isnan(want) ? std::isnan(got) : got == want || error <= bound;
    if (bound > 0 && error / bound > worst_) worst_ = error / bound;
    expect(holds, where..., ": got ", got, ", want ", want, " within ", bound);
  }

 private:
  int64_t checks_ = 0, failures_ = 0;
  double worst_ = 0;  // error as a share of its bound
  std::string first_failure_;
};

// Prints "N passed, N failed"; the process's exit status.
int finish();

class Random {  // a 64-bit linear congruential generator (Knuth's MMIX constants), its high bits
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    const uint64_t high = next() >> 32;
    return high << 32 | next() >> 32;
  }
  int64_t below(int64_t bound) { return static_cast<int64_t>((next() >> 33) % static_cast<uint64_t>(bound)); }
  float normal_ish() {  // in [-2, 2], every value a multiple of 2^-20
    return (static_cast<float>(next() >> 42) - 2097152.0f) * 0x1p-20f;
  }

 private:
  uint64_t next() { return state_ = state_ * 6364136223846793005u + 1442695040888963407u; }
  uint64_t state_;
};

}  // namespace mprec::test
