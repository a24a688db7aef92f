#include "arch/aarch64.h"

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "common/cpu.h"
#include "common/error.h"

namespace mprec {
namespace {

std::string read_model() {
#if defined(__linux__)
  // There is no register with a name. Linux lets programs read the one that identifies the core, by trapping.
  if (getauxval(AT_HWCAP) & HWCAP_CPUID) {
    uint64_t id;
    asm("mrs %0, midr_el1" : "=r"(id));
    return message("aarch64 CPU, implementer ", id >> 24 & 0xff, " part ", id >> 4 & 0xfff, " revision r",
                   id >> 20 & 15, "p", id & 15);
  }
#elif defined(__APPLE__)
  char name[128];
  size_t size = sizeof name;
  if (sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0) return name;
#endif
  return "unknown CPU";
}

}  // namespace

const std::string& cpu_model() {
  static const std::string model = read_model();
  return model;
}

bool has_sve256() {
#if defined(__linux__)
  if (!(getauxval(AT_HWCAP) & HWCAP_SVE) || !(getauxval(AT_HWCAP2) & HWCAP2_SVEBF16)) return false;
  const int length = prctl(PR_SVE_GET_VL);
  return length >= 0 && (length & PR_SVE_VL_LEN_MASK) == 256 / 8;
#else
  return false;
#endif
}

}  // namespace mprec
