// u = +-1 / sqrt(3), plus where h has its high bit: the uniform encoding's variance.
#pragma once
#include "dhe/families/mersenne.h"

namespace mprec::MPREC_ISA {

struct Sign : MersenneFamily<Sign> {
  static constexpr float lut_magnitude = sign_magnitude;
  static Vec to_unit(Int h) {  // h's top bit, 2^30, turns the minus into a plus
    return from_bits(((h << 1) & broadcast_int(0x80000000u)) ^ bits(broadcast(-sign_magnitude)));
  }
};

}  // namespace mprec::MPREC_ISA
