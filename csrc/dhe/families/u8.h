// The high eight bits of h: 256 levels.
#pragma once
#include "dhe/families/mersenne.h"

namespace mprec::MPREC_ISA {

struct U8 : Levels<U8, 8> {};

}  // namespace mprec::MPREC_ISA
