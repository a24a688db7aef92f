#include "arch/x86_64.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "common/cpu.h"

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

bool lends_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace mprec
