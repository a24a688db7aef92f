#include "common/cpu.h"

#include <cpuid.h>

#include <cstring>
#include <stdexcept>

#include "common/error.h"

namespace mprec {

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
    __builtin_cpu_init();
    CpuFeatures f{};
    // libgcc's test covers the operating system's saved-state bits (XCR0) too.
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    return f;
  }();
  return features;
}

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

bool can_run(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16: return cpu_features().avx512_vnni && cpu_features().avx512_bf16;
    case Isa::avx512vnni: return cpu_features().avx512_vnni;
    case Isa::avx512: return cpu_features().avx512;
    case Isa::avx2: return cpu_features().avx2;
    default: return true;
  }
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

Isa parse_isa(const std::string& name) {
  for (Isa isa : all_isas)
    if (name == isa_name(isa)) return isa;
  std::string names;
  for (Isa isa : all_isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  throw std::invalid_argument(message("isa: '", name, "' is none of ", names));
}

}  // namespace mprec
