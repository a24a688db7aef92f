// A program that does one thing on purpose, for the emulator's own test: probe ACTION
#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "guarded.h"

using mprec::test::Edge;
using mprec::test::Guarded;

namespace {

__attribute__((target("avx512f"))) float sum_of_16(const float* x) {
  return _mm512_reduce_add_ps(_mm512_loadu_ps(x));
}

// Ends one float before `x + 16` does; the mask keeps the load off the next page.
__attribute__((target("avx512f"))) float sum_of_15(const float* x) {
  return _mm512_reduce_add_ps(_mm512_maskz_loadu_ps(0x7fff, x));
}

int protection_changes() {
  const size_t page = 4096;
  char* p = static_cast<char*>(mmap(nullptr, 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (int round = 0; round < 3; ++round) {
    if (mprotect(p, 2 * page, PROT_READ | PROT_WRITE) != 0) return 1;
    p[round] = 42;
    p[page + round] = 43;
    if (mprotect(p, 2 * page, PROT_READ) != 0) return 2;
    for (int i = 0; i <= round; ++i)
      if (p[i] != 42 || p[page + i] != 43) return 3;  // what was written stays
  }
  return munmap(p, 2 * page);
}

}  // namespace

int main(int argc, char** argv) {
  const auto asked = [&](const char* action) { return argc > 1 && std::strcmp(argv[1], action) == 0; };
  Guarded<float> fifteen(15, asked("under-read") ? Edge::begin : Edge::end);
  for (int i = 0; i < 15; ++i) fifteen[i] = static_cast<float>(i);

  if (asked("avx512")) return sum_of_15(fifteen.data()) == 105 ? 0 : 1;
  if (asked("over-read")) return sum_of_16(fifteen.data()) > 0;
  if (asked("under-read")) return *(static_cast<const volatile float*>(fifteen.data()) - 1) > 0;
  if (asked("write-to-code")) return *reinterpret_cast<volatile char*>(&main) = 1;
  if (asked("use-after-unmap")) {
    char* p =
        static_cast<char*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    *static_cast<volatile char*>(p) = 1;
    munmap(p, 4096);
    return *static_cast<volatile char*>(p);
  }
  if (asked("protection")) return protection_changes();
  if (asked("divide")) {
    volatile int zero = 0;
    return argc / zero;
  }
  if (asked("abort")) std::abort();
  if (asked("exit-7")) std::exit(7);
  if (asked("echo")) {
    char line[64] = {};
    if (!std::fgets(line, sizeof line, stdin)) return 1;
    std::printf("%s%s", line, argc > 2 ? argv[2] : "");
    return 0;
  }
  if (asked("throw")) {
    try {
      throw std::vector<int>(3);
    } catch (const std::vector<int>& caught) {
      return caught.size() == 3 ? 0 : 1;
    }
  }
  if (asked("threads")) return omp_get_max_threads();
  return 2;
}
