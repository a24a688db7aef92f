// Work shared among threads: every part once, in slots of its own, by callers of any number.
#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "suites.h"

namespace mprec::test {
namespace {

// Calls of every size; returns how many of them left a part out, ran one twice, or lent a slot twice at a
// time.
int wrong_calls(int threads, int calls) {
  int wrong = 0;
  for (int call = 0; call < calls; ++call) {
    const int64_t parts = call % 40;
    std::vector<int> times(parts), values(parts);  // plain: a race would be one for ThreadSanitizer
    std::vector<std::atomic<int>> in_slot(threads);
    std::atomic<bool> bad{false};
    const int given = call;
    parallel_parts(parts, threads, [&](int64_t i, int slot) {
      if (slot < 0 || slot >= threads || in_slot[slot].fetch_add(1)) bad = true;
      ++times[i];
      values[i] = given + static_cast<int>(i);
      in_slot[slot].fetch_sub(1);
    });
    for (int64_t i = 0; i < parts; ++i) bad = bad || times[i] != 1 || values[i] != given + i;
    wrong += bad;
  }
  return wrong;
}

void test_ranges(int threads) {
  Case c("parallel ranges, " + std::to_string(threads) + " thread(s)");
  for (int64_t n : {0, 1, 2, 3, 7, 1000})
    for (int ranges = 1; ranges <= threads + 1; ++ranges) {
      std::vector<int> times(n);
      std::atomic<int64_t> begun{0};
      parallel_ranges(n, ranges, [&](int64_t begin, int64_t end) {
        ++begun;
        for (int64_t i = begin; i < end; ++i) ++times[i];
      });
      c.expect(std::set<int>(times.begin(), times.end()) == (n ? std::set<int>{1} : std::set<int>{}), n,
               " in ", ranges);
      c.expect(begun == std::min<int64_t>(n, ranges), begun.load(), " ranges of ", n, " in ", ranges);
    }
}

void test_errors(int threads) {
  Case c("parallel errors, " + std::to_string(threads) + " thread(s)");
  for (int64_t bad = 0; bad < 20; ++bad) {
    std::atomic<bool> ran{false};
    try {
      parallel_parts(20, threads, [&](int64_t i, int) {
        if (i == bad) {
          ran = true;
          throw std::runtime_error(std::to_string(i));
        }
      });
      c.expect(false, "nothing was thrown of part ", bad);
    } catch (const std::runtime_error& error) {
      c.expect(ran && error.what() == std::to_string(bad), error.what(), ", want ", bad);
    }
    c.expect(wrong_calls(threads, 40) == 0, "calls after an error");
  }
}

void test_nested(int threads) {
  Case c("parallel calls within calls, " + std::to_string(threads) + " thread(s)");
  std::atomic<int> sum{0};
  parallel_parts(8, threads, [&](int64_t, int) { parallel_parts(9, threads, [&](int64_t, int) { ++sum; }); });
  c.expect(sum == 72, sum.load(), " parts");
}

}  // namespace

void parallel_suite(int threads) {
  {
    Case c("parallel parts, " + std::to_string(threads) + " thread(s)");
    c.expect(wrong_calls(threads, 2000) == 0, "parts");
  }
  test_ranges(threads);
  test_errors(threads);
  test_nested(threads);
  if (threads == 1) return;  // an emulated CPU may have one thread
  Case c("parallel calls of several threads at once");
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) callers.emplace_back([&, i] { wrong += wrong_calls(threads + i, 2000); });
  for (std::thread& caller : callers) caller.join();
  c.expect(wrong == 0, wrong.load(), " calls went wrong");
}

}  // namespace mprec::test
