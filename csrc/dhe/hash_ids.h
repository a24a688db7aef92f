// Runs a hash over IDs: a vector of hash functions at a time, and several IDs for each load of coefficients.
#pragma once
#include "dhe/dhe.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

// Hash functions [k0, k0 + count) of n IDs, handed to `sink(i, j, h)`: a vector of hashes, of ID i and
// from the function k0 + j on. Whole vectors, so up to 15 hashes past `count`; past k they are 0.

// Copies of the arguments, because `sink` writes to memory: to the compiler the originals might be there.
template <class Hash, class Id, int n, class Sink>
inline void hash_group(EncoderView e, const int64_t* ids, int64_t first, int k0, int count, Sink sink) {
  const auto id = [&](int i) { return Id(ids[i < n ? i : 0]); };
  const Id group[8] = {id(0), id(1), id(2), id(3), id(4), id(5), id(6), id(7)};
  for (int j = 0; j < count; j += Vec::width) {
    const Hash hash(e, k0 + j);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) sink(first + i, j, hash(group[i]));
  }
}

template <class Hash, class Id, class Sink>
inline void hash_ids(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count,
                     const Sink& sink) {
  constexpr int together = Vec::width == 16 ? 8 : 4;  // what the registers hold
  int64_t i = 0;
  for (; i + together <= n; i += together) hash_group<Hash, Id, together>(e, ids + i, i, k0, count, sink);
  for (; i < n; ++i) hash_group<Hash, Id, 1>(e, ids + i, i, k0, count, sink);
}

// Stores encodings: out[i * stride + j] is u of ID i and hash function k0 + j.
template <class Family>
struct StoreUnits {
  float* out;
  int64_t stride;
  void operator()(int64_t i, int j, Int h) const { store(out + i * stride + j, Family::to_unit(h)); }
};

// Correctly rounded h / divisor for the integers that occur: the product by the reciprocal, corrected once.
inline Vec exact_ratio(Vec h, float divisor) {
  if constexpr (Vec::width == 1) return h / broadcast(divisor);
  const Vec reciprocal = broadcast(1.0f / divisor), q = h * reciprocal;
  return fma(fma(broadcast(-divisor), q, h), reciprocal, q);
}

}  // namespace mprec::MPREC_ISA
