// What this CPU can run, asked once.
#pragma once
#include <string>

#include "isa/list.h"

namespace mprec {

#define MPREC_NAME(name, supported) name,
enum class Isa { MPREC_ISAS(MPREC_NAME) };
#undef MPREC_NAME
#define MPREC_NAME(name, supported) Isa::name,
constexpr Isa all_isas[] = {MPREC_ISAS(MPREC_NAME)};  // slowest first
#undef MPREC_NAME

const std::string& cpu_model();  // as the CPU names itself
bool can_run(Isa);
const char* isa_name(Isa);
Isa parse_isa(const std::string&);  // std::invalid_argument for an unknown name

}  // namespace mprec
