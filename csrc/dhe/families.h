// The hash families: a line here and in hash.h, and a struct in a file of its own (families/).
#pragma once
#include <cstdint>

// X(name, struct). The name is that of checkpoints, the place in the list the number that kernels get.
#define MPREC_HASH_FAMILIES(X)           \
  X(universal, Universal)                \
  X(artifact, Artifact)                  \
  X(artifact_gaussian, ArtifactGaussian) \
  X(sign, Sign)                          \
  X(u7, U7)                              \
  X(u8, U8)

namespace mprec {

#define MPREC_NAME(name, Family) name,
enum class HashFamily : int { MPREC_HASH_FAMILIES(MPREC_NAME) };
#undef MPREC_NAME

struct FamilyTraits {
  const char* name;
  bool artifact;        // the hash modulo 1000003, of 2 rows of coefficients; else modulo 2^31 - 1, of 4
  int together;         // so many hashes are transformed together: k is a multiple
  int level_bits;       // u is one of 2^level_bits evenly spaced levels; 0: it is not
  float int8_unit;      // of the seven high bits, for a first layer in int8 (int8.h); 0: no such layer
  float lut_magnitude;  // u is + or - that, for a first layer by look-up (lut.h); 0: no such layer
};

constexpr int num_hash_families = 0
#define MPREC_COUNT(name, Family) +1
    MPREC_HASH_FAMILIES(MPREC_COUNT);
#undef MPREC_COUNT

const FamilyTraits& traits(HashFamily);

}  // namespace mprec
