// Hashes of IDs, a vector of hash functions at a time and several IDs for each load of coefficients.
#pragma once
#include "dhe/dhe.h"
#include "dhe/int_vec.h"
#include "dhe/math.h"

namespace mprec::MPREC_ISA {

// ---- universal, sign, u7: h = (a x0 + c x1 + d x2 + b) mod p, p = 2^31 - 1

constexpr uint32_t limb_mask = (1u << 30) - 1;

// An ID below 2^30 is one limb, and costs a third of the multiplications.
inline bool one_limb(int64_t id) { return static_cast<uint64_t>(id) <= limb_mask; }

template <bool single>
struct Limbs {
  Int x0, x1, x2;
  explicit Limbs(int64_t id) {
    const uint64_t x = static_cast<uint64_t>(id);
    x0 = broadcast_int(x & limb_mask);
    if constexpr (!single) {
      x1 = broadcast_int(x >> 30 & limb_mask);
      x2 = broadcast_int(x >> 60);
    }
  }
};

// Coefficients are stored doubled, so that of v = a x0 + ... + b the accumulated 2v has v >> 31 as its high
// word and 2 (v & p) as its low word: v mod p is their sum, folded, with no shift across 64-bit lanes.
template <bool single>
struct UniversalHash {
  Wide a, b, c, d;
  UniversalHash(const EncoderView& e, int k) {
    a = factors(load_slots(e.row(0), k));
    b = widen(load_slots(e.row(1), k));
    if constexpr (!single) {
      c = factors(load_slots(e.row(2), k));
      d = factors(load_slots(e.row(3), k));
    }
  }
  Int operator()(const Limbs<single>& x) const {
    const Int p = broadcast_int(mersenne_p);
    Wide v = a * x.x0 + b;
    Int folded;
    if constexpr (single) {
      folded = high(v);  // < 2^30
    } else {
      v = v + c * x.x1 + d * x.x2;
      folded = high(v);  // < 2^31 + 16 < 2p
      folded = lesser_unsigned(folded, folded - p);
    }
    const Int s = (low(v) >> 1) + folded;
    return lesser_unsigned(s, s - p);
  }
};

// ---- artifact: h = ((a x + b) mod p) mod m, p = 1000003, m = 10^6

// Above this, a x + b may not fit an int64, and what the formula's wrap-around gives is computed one by one.
constexpr int64_t artifact_exact_ids = INT64_MAX / artifact_p - 1;

struct ArtifactId {
  Int x;  // x mod p
  Vec xf;
  explicit ArtifactId(int64_t id) {
    const uint32_t residue = static_cast<uint32_t>(static_cast<uint64_t>(id) % artifact_p);
    x = broadcast_int(residue);
    xf = broadcast(static_cast<float>(residue));
  }
};

// The quotient in floats is off by less than 0.7, so the remainder, exact modulo 2^32, lies in (-p, p).
struct ArtifactHash {
  Int a, b;
  Vec a_over_p, b_over_p;
  ArtifactHash(const EncoderView& e, int k)
      : a(load(e.row(0) + k)),
        b(load(e.row(1) + k)),
        a_over_p(from_bits(load(e.row(2) + k))),
        b_over_p(from_bits(load(e.row(3) + k))) {}
  Int operator()(const ArtifactId& id) const {
    const Int p = broadcast_int(artifact_p), m = broadcast_int(artifact_m);
    const Int quotient = round_to_int(fma(a_over_p, id.xf, b_over_p));
    Int r = a * id.x + b - quotient * p;
    r = lesser_unsigned(r, r + p);
    return lesser_unsigned(r, r - m);
  }
};

inline int64_t artifact_wrapped(const EncoderView& e, int k, int64_t id) {
  const uint64_t sum = static_cast<uint64_t>(e.row(0)[k]) * static_cast<uint64_t>(id) + e.row(1)[k];
  return static_cast<int64_t>(sum) % artifact_p % artifact_m;  // may be negative, as in C
}

// ---- h to u

// Correctly rounded h / divisor for the integers that occur: the product by the reciprocal, corrected once.
inline Vec exact_ratio(Vec h, float divisor) {
  if constexpr (Vec::width == 1) return h / broadcast(divisor);
  const Vec reciprocal = broadcast(1.0f / divisor), q = h * reciprocal;
  return fma(fma(broadcast(-divisor), q, h), reciprocal, q);
}

template <HashFamily family>
inline Vec to_unit(Int h) {
  if constexpr (family == HashFamily::universal)
    return fma(to_float(h), broadcast(0x1p-30f), broadcast(-1.0f));
  else if constexpr (family == HashFamily::sign)  // h's top bit, 2^30, turns the minus into a plus
    return from_bits(((h << 1) & broadcast_int(0x80000000u)) ^ bits(broadcast(-sign_magnitude)));
  else if constexpr (family == HashFamily::u7)  // 2 level - 127
    return exact_ratio(to_float((h >> 24) + (h >> 24)) - broadcast(127.0f), 127.0f);
  else if constexpr (family == HashFamily::artifact_gaussian)
    return to_float(h);
  else
    return fma(exact_ratio(to_float(h), artifact_m - 1), broadcast(2.0f), broadcast(-1.0f));
}

// ---- Hash functions [k0, k0 + count) of n IDs, handed to `sink(i, j, h)`: a vector of hashes, of ID i and
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

template <class Sink>
void hash_universal(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count,
                    const Sink& sink) {
  bool single = true;
  for (int64_t i = 0; i < n; ++i) single &= one_limb(ids[i]);
  if (single)
    hash_ids<UniversalHash<true>, Limbs<true>>(e, ids, n, k0, count, sink);
  else
    hash_ids<UniversalHash<false>, Limbs<false>>(e, ids, n, k0, count, sink);
}

// ---- Encodings: out[i * stride + j] is u of ID i and hash function k0 + j.

template <HashFamily family>
struct StoreUnits {
  float* out;
  int64_t stride;
  void operator()(int64_t i, int j, Int h) const { store(out + i * stride + j, to_unit<family>(h)); }
};

template <HashFamily family>
void encode_artifact(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                     int64_t stride) {
  hash_ids<ArtifactHash, ArtifactId>(e, ids, n, k0, count, StoreUnits<family>{out, stride});
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] <= artifact_exact_ids) continue;
    for (int j = 0; j < count; ++j) {
      const float h = static_cast<float>(artifact_wrapped(e, k0 + j, ids[i]));
      const bool raw = family == HashFamily::artifact_gaussian;
      out[i * stride + j] = raw ? h : h / static_cast<float>(artifact_m - 1) * 2.0f - 1.0f;
    }
  }
}

// Box and Muller's transform of the pair (h[2i], h[2i+1]): sqrt(-2 ln U1) times the cosine, then the sine, of
// 2 pi U2, with U = (h + 1) / m.
inline Vec box_muller(Vec h1, Vec h2, Vec lag) {
  const Vec one = broadcast(1.0f), m = broadcast(artifact_m);
  return sqrt(broadcast(-2.0f) * log((h1 + one) / m)) * cos_turns((h2 + one) / m - lag);
}

inline void encode_gaussian(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count,
                            float* out, int64_t stride) {
  encode_artifact<HashFamily::artifact_gaussian>(e, ids, n, k0, count, out, stride);
  for (int64_t i = 0; i < n; ++i) {
    float* row = out + i * stride;
    if (ids[i] > artifact_exact_ids) {  // h may be negative, and the logarithm infinite or NaN
      for (int j = 0; j + 1 < count; j += 2) {
        const double u1 = (row[j] + 1.0) / artifact_m,
                     turn = 6.283185307179586 * (row[j + 1] + 1.0) / artifact_m;
        const double radius = __builtin_sqrt(-2.0 * __builtin_log(u1));
        row[j] = static_cast<float>(radius * __builtin_cos(turn));
        row[j + 1] = static_cast<float>(radius * __builtin_sin(turn));
      }
      continue;
    }
#if defined(__AVX2__)
    // A sine is a cosine a quarter of a turn later.
    alignas(64) static constexpr float lags[16] = {0, .25f, 0, .25f, 0, .25f, 0, .25f,
                                                   0, .25f, 0, .25f, 0, .25f, 0, .25f};
    for (int j = 0; j < count; j += Vec::width) {
      const Vec h = load(row + j);
      store(row + j, box_muller(pair_first(h), pair_second(h), load(lags)));
    }
#else
    for (int j = 0; j + 1 < count; j += 2) {
      const Vec h1 = load(row + j), h2 = load(row + j + 1);
      store(row + j, box_muller(h1, h2, broadcast(0.0f)));
      store(row + j + 1, box_muller(h1, h2, broadcast(0.25f)));
    }
#endif
  }
}

inline void encode_block(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                         int64_t stride) {
  switch (e.family) {
    case HashFamily::universal:
      return hash_universal(e, ids, n, k0, count, StoreUnits<HashFamily::universal>{out, stride});
    case HashFamily::sign:
      return hash_universal(e, ids, n, k0, count, StoreUnits<HashFamily::sign>{out, stride});
    case HashFamily::u7: return hash_universal(e, ids, n, k0, count, StoreUnits<HashFamily::u7>{out, stride});
    case HashFamily::artifact:
      return encode_artifact<HashFamily::artifact>(e, ids, n, k0, count, out, stride);
    case HashFamily::artifact_gaussian: return encode_gaussian(e, ids, n, k0, count, out, stride);
  }
}

}  // namespace mprec::MPREC_ISA
