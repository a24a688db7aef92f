#include "rows/formats.h"

#include "rows/rows.h"

namespace mprec {

const FormatTraits& traits(Format format) {
  using namespace scalar;
  static constexpr FormatTraits all[] = {
#define MPREC_TRAITS(name, Row, users) \
  {#users, Format::name, Row::quantised, Row::bits, Row::code, &Row::bytes, &Row::dim, Row::paired},
      MPREC_ALL_FORMATS(MPREC_TRAITS)
#undef MPREC_TRAITS
  };
  return all[static_cast<int>(format)];
}

}  // namespace mprec
