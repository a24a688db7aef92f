#include "dhe/families.h"

#include "dhe/hash.h"

namespace mprec {

const FamilyTraits& traits(HashFamily family) {
  using namespace scalar;
  static constexpr FamilyTraits all[] = {
#define MPREC_TRAITS(name, Family) \
  {#name, Family::artifact, Family::together, Family::level_bits, Family::int8_unit, Family::lut_magnitude},
      MPREC_HASH_FAMILIES(MPREC_TRAITS)
#undef MPREC_TRAITS
  };
  return all[static_cast<int>(family)];
}

}  // namespace mprec
