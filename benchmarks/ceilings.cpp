// What this core can do at best: read bandwidth, random row gathers, fused multiply-adds.
// Compiled with -march=native by ceilings.py; never part of the library.
#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * width), aligned(4)));

extern "C" {

// Multiply-adds on independent accumulators held in registers; returns the flops done.
double fma_flops(long iterations, float* sink) {
  Vec a0{}, a1{}, a2{}, a3{}, a4{}, a5{}, a6{}, a7{}, a8{}, a9{}, m = Vec{} + 0.999999f, b = Vec{} + 1e-7f;
  for (long i = 0; i < iterations; ++i) {
    // The empty statement keeps the compiler from folding the loop; the operands stay in registers.
#define STEP(a)  \
  a = a * m + b; \
  asm volatile("" : "+x"(a));
    STEP(a0) STEP(a1) STEP(a2) STEP(a3) STEP(a4) STEP(a5) STEP(a6) STEP(a7) STEP(a8) STEP(a9)
#undef STEP
  }
  const Vec sum = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)) + (a8 + a9);
  for (int i = 0; i < width; ++i) sink[i] = sum[i];
  return 2.0 * 10 * width * iterations;
}

// Sums n floats (n a multiple of 4 * width).
void read_all(const float* data, size_t n, float* sink) {
  Vec s0{}, s1{}, s2{}, s3{};
  for (size_t i = 0; i < n; i += 4 * width) {
    s0 += *reinterpret_cast<const Vec*>(data + i);
    s1 += *reinterpret_cast<const Vec*>(data + i + width);
    s2 += *reinterpret_cast<const Vec*>(data + i + 2 * width);
    s3 += *reinterpret_cast<const Vec*>(data + i + 3 * width);
  }
  const Vec s = (s0 + s1) + (s2 + s3);
  for (int i = 0; i < width; ++i) sink[i] = s[i];
}

// Sum-pools `bag` consecutive IDs of rows of D floats into each output row, prefetching `ahead` rows to the
// L2 cache.
#define GATHER(D)                                                                                     \
  void gather_##D(const float* table, const int64_t* ids, long n, long bag, long ahead, float* out) { \
    for (long i = 0; i < n; i += bag, out += D) {                                                     \
      Vec acc[D / width] = {};                                                                        \
      for (long j = i; j < i + bag; ++j) {                                                            \
        if (j + ahead < n) {                                                                          \
          const char* next = reinterpret_cast<const char*>(table + ids[j + ahead] * D);               \
          for (int line = 0; line < D * 4; line += 64) __builtin_prefetch(next + line, 0, 2);         \
        }                                                                                             \
        const float* row = table + ids[j] * D;                                                        \
        for (int c = 0; c < D / width; ++c) acc[c] += *reinterpret_cast<const Vec*>(row + c * width); \
      }                                                                                               \
      for (int c = 0; c < D / width; ++c) *reinterpret_cast<Vec*>(out + c * width) = acc[c];          \
    }                                                                                                 \
  }
GATHER(16)
GATHER(32)
GATHER(64)
GATHER(128)
}
