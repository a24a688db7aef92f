#include "common/cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "common/error.h"

namespace mprec {

const std::string& cpu_model() {
  static const std::string model = [] {
    unsigned regs[12] = {};
    unsigned top = 0, b, c, d;
    __get_cpuid(0x80000000u, &top, &b, &c, &d);
    if (top < 0x80000004u) return std::string("unknown CPU");
    for (unsigned i = 0; i < 3; ++i)
      __get_cpuid(0x80000002u + i, &regs[4 * i], &regs[4 * i + 1], &regs[4 * i + 2], &regs[4 * i + 3]);
    char brand[49] = {};
    std::memcpy(brand, regs, 48);
    std::string s(brand);
    s.erase(s.find_last_not_of(" \0") + 1);
    s.erase(0, s.find_first_not_of(' '));
    return s;
  }();
  return model;
}

namespace {

// Linux gives a process the registers of AMX when it asks (arch_prctl, from 5.16 on); all its threads have
// them then. It says no where a signal handler's stack would not hold them.
bool lends_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

bool can_run(Isa isa) {
  // libgcc's test covers the operating system's saved-state bits (XCR0) too.
  static const bool supported[] = {
#define MPREC_SUPPORTED(name, condition) (__builtin_cpu_init(), condition),
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
