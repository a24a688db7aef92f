// Hashes of IDs by family: each is a struct in a file of its own, listed in families.h.
#pragma once
#include "dhe/families/artifact.h"
#include "dhe/families/artifact_gaussian.h"
#include "dhe/families/sign.h"
#include "dhe/families/u7.h"
#include "dhe/families/u8.h"
#include "dhe/families/universal.h"

namespace mprec::MPREC_ISA {

inline bool is_artifact(HashFamily family) {
  switch (family) {
#define MPREC_CASE(name, Family) \
  case HashFamily::name: return Family::artifact;
    MPREC_HASH_FAMILIES(MPREC_CASE)
#undef MPREC_CASE
  }
  return false;
}

// Encodings of n IDs: out[i * stride + j] is u of ID i and hash function k0 + j, j < count. Whole vectors.
inline void encode_block(const EncoderView& e, const int64_t* ids, int64_t n, int k0, int count, float* out,
                         int64_t stride) {
  switch (e.family) {
#define MPREC_CASE(name, Family) \
  case HashFamily::name: return Family::encode(e, ids, n, k0, count, out, stride);
    MPREC_HASH_FAMILIES(MPREC_CASE)
#undef MPREC_CASE
  }
}

}  // namespace mprec::MPREC_ISA
