// What this CPU can run, asked once.
#pragma once
#include <string>

namespace mprec {

// avx512: F, BW, DQ, VL. avx512vnni: those and VNNI. avx512bf16: those and BF16.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, avx512bf16 = 4 };
constexpr Isa all_isas[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512vnni,
                            Isa::avx512bf16};  // slowest first

struct CpuFeatures {
  bool avx2;    // AVX2, FMA, F16C, BMI2
  bool avx512;  // F, BW, DQ, VL
  bool avx512_vnni;
  bool avx512_bf16;
};

const CpuFeatures& cpu_features();
const std::string& cpu_model();  // brand string
bool can_run(Isa);
const char* isa_name(Isa);
Isa parse_isa(const std::string&);  // std::invalid_argument for an unknown name

}  // namespace mprec
