// The high seven bits of h: 128 levels.
#pragma once
#include "dhe/families/mersenne.h"

namespace mprec::MPREC_ISA {

struct U7 : Levels<U7, 7> {
  static constexpr float int8_unit = 1.0f / 127.0f;
};

}  // namespace mprec::MPREC_ISA
