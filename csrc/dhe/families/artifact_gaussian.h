// Normal numbers from pairs of artifact hashes, by Box and Muller's transform.
#pragma once
#include "dhe/families/artifact.h"
#include "dhe/math.h"

namespace mprec::MPREC_ISA {

// Box and Muller's transform of the pair (h[2i], h[2i+1]): sqrt(-2 ln U1) times the cosine, then the sine, of
// 2 pi U2, with U = (h + 1) / m.
inline Vec box_muller(Vec h1, Vec h2, Vec lag) {
  const Vec one = broadcast(1.0f), m = broadcast(artifact_m);
  return sqrt(broadcast(-2.0f) * log((h1 + one) / m)) * cos_turns((h2 + one) / m - lag);
}

// The pairs of `count` hashes in a row. A template: one register holds a pair, or half of one.
template <class V>
__attribute__((always_inline)) inline void transform_pairs(float* row, int count) {
  if constexpr (V::width > 1) {
    // A sine is a cosine a quarter of a turn later.
    alignas(64) static constexpr float lags[16] = {0, .25f, 0, .25f, 0, .25f, 0, .25f,
                                                   0, .25f, 0, .25f, 0, .25f, 0, .25f};
    for (int j = 0; j < count; j += V::width) {
      const V h = load(row + j);
      store(row + j, box_muller(pair_first(h), pair_second(h), load(lags)));
    }
  } else {
    for (int j = 0; j + 1 < count; j += 2) {
      const V h1 = load(row + j), h2 = load(row + j + 1);
      store(row + j, box_muller(h1, h2, broadcast(0.0f)));
      store(row + j + 1, box_muller(h1, h2, broadcast(0.25f)));
    }
  }
}

struct ArtifactGaussian {
  static constexpr bool artifact = true;
  static constexpr int together = 2, level_bits = 0;
  static constexpr float int8_unit = 0, lut_magnitude = 0;
  static Vec to_unit(Int h) { return to_float(h); }  // to be transformed
  static float wrapped_unit(float h) { return h; }
  static void encode(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                     int64_t stride) {
    encode_artifact<ArtifactGaussian>(e, ids, n, k0, count, out, stride);
    for (int64_t i = 0; i < n; ++i) {
      float* row = out + i * stride;
      if (ids[i] <= artifact_exact_ids) {
        transform_pairs<Vec>(row, count);
        continue;
      }
      for (int j = 0; j + 1 < count; j += 2) {  // h may be negative, and the logarithm infinite or NaN
        const double u1 = (row[j] + 1.0) / artifact_m,
                     turn = 6.283185307179586 * (row[j + 1] + 1.0) / artifact_m;
        const double radius = __builtin_sqrt(-2.0 * __builtin_log(u1));
        row[j] = static_cast<float>(radius * __builtin_cos(turn));
        row[j + 1] = static_cast<float>(radius * __builtin_sin(turn));
      }
    }
  }
};

}  // namespace mprec::MPREC_ISA
