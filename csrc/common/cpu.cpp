#include "common/cpu.h"

#include <stdexcept>

#include "arch/arch.h"
#include "common/error.h"

namespace mprec {

bool can_run(Isa isa) {
  static const bool supported[] = {
#define MPREC_SUPPORTED(name, condition) (condition),
      MPREC_ISAS(MPREC_SUPPORTED)
#undef MPREC_SUPPORTED
  };
  return supported[static_cast<int>(isa)];
}

const char* isa_name(Isa isa) {
  static constexpr const char* names[] = {
#define MPREC_NAME(name, condition) #name,
      MPREC_ISAS(MPREC_NAME)
#undef MPREC_NAME
  };
  return names[static_cast<int>(isa)];
}

Isa parse_isa(const std::string& name) {
  for (Isa isa : all_isas)
    if (name == isa_name(isa)) return isa;
  std::string names;
  for (Isa isa : all_isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  throw std::invalid_argument(message("isa: '", name, "' is none of ", names));
}

}  // namespace mprec
