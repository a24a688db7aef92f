// h = ((a x + b) mod p) mod m, p = 1000003, m = 10^6; u = 2h / (m - 1) - 1: bit-compatible with the code of
// the DHE and MP-Rec papers.
#pragma once
#include "dhe/hash_ids.h"

namespace mprec::MPREC_ISA {

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

// Encodings by Family::to_unit; where sums wrap around, by Family::wrapped_unit.
template <class Family>
void encode_artifact(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                     int64_t stride) {
  hash_ids<ArtifactHash, ArtifactId>(e, ids, n, k0, count, StoreUnits<Family>{out, stride});
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] <= artifact_exact_ids) continue;
    for (int j = 0; j < count; ++j)
      out[i * stride + j] = Family::wrapped_unit(static_cast<float>(artifact_wrapped(e, k0 + j, ids[i])));
  }
}

struct Artifact {
  static constexpr bool artifact = true;
  static constexpr int together = 1, level_bits = 0;
  static constexpr float int8_unit = 0, lut_magnitude = 0;
  static Vec to_unit(Int h) {
    return fma(exact_ratio(to_float(h), artifact_m - 1), broadcast(2.0f), broadcast(-1.0f));
  }
  static float wrapped_unit(float h) { return h / static_cast<float>(artifact_m - 1) * 2.0f - 1.0f; }
  static void encode(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                     int64_t stride) {
    encode_artifact<Artifact>(e, ids, n, k0, count, out, stride);
  }
};

}  // namespace mprec::MPREC_ISA
