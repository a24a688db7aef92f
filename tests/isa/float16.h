// float16 as the compiler has it: an oracle for the kernels' own conversions.
#pragma once

namespace mprec::test {

#if defined(__aarch64__)
using Float16 = __fp16;  // g++ has _Float16 there from version 13 on
#else
using Float16 = _Float16;
#endif

}  // namespace mprec::test
