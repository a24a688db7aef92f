// h = (a x0 + c x1 + d x2 + b) mod p, p = 2^31 - 1, over the ID's limbs of 30 bits: the hash of several
// families, which differ in how h becomes a number.
#pragma once
#include "dhe/hash_ids.h"

namespace mprec::MPREC_ISA {

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

// What a family of this hash is, unless it says otherwise; families.h says what each constant means.
template <class Family>
struct MersenneFamily {
  static constexpr bool artifact = false;
  static constexpr int together = 1, level_bits = 0;
  static constexpr float int8_unit = 0, lut_magnitude = 0;
  static void encode(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                     int64_t stride) {
    hash_universal(e, ids, n, k0, count, StoreUnits<Family>{out, stride});
  }
};

// A family of evenly spaced levels: u = (2 level - most) / most for the high `bits` of h.
template <class Family, int bits>
struct Levels : MersenneFamily<Family> {
  static constexpr int level_bits = bits;
  static Vec to_unit(Int h) {
    constexpr float most = (1 << bits) - 1;
    return exact_ratio(to_float((h >> (31 - bits)) + (h >> (31 - bits))) - broadcast(most), most);
  }
};

}  // namespace mprec::MPREC_ISA
