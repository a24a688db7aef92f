// u = 2h / (p - 1) - 1.
#pragma once
#include "dhe/families/mersenne.h"

namespace mprec::MPREC_ISA {

struct Universal : MersenneFamily<Universal> {
  static constexpr float int8_unit = 1.0f / 128.0f;  // the middle of a level's interval of hashes
  static Vec to_unit(Int h) { return fma(to_float(h), broadcast(0x1p-30f), broadcast(-1.0f)); }
};

}  // namespace mprec::MPREC_ISA
