# The instruction sets, slowest first. One line here and one header, isa/NAME.h, each.
#   BASE   whatever it demands of the CPU and the compiler, this one does too
#   ARCH   the architecture (arch/ARCH.h); without it that of BASE. Other architectures are built without this ISA
#   CPU    features that the CPU must have, as __builtin_cpu_supports names them
#   LENT   a function of arch/ARCH.h that asks the operating system for what it does not give by itself, or what
#          __builtin_cpu_supports does not know; an ISA with this one for its BASE would have to ask too
#   FLAGS  for the compiler
#   FOR    the families of kernels that gain by it; those of the nearest BASE serve the others
mprec_isa(scalar     FOR all)
mprec_isa(avx2       BASE scalar ARCH x86_64 CPU avx2 fma bmi2 f16c FOR all
                     FLAGS -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt -mprfchw)
# gcc 12 takes its own AVX-512 intrinsics' undefined registers for uninitialised variables.
mprec_isa(avx512     BASE avx2 CPU avx512f avx512bw avx512dq avx512vl FOR all
                     FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
                           -Wno-maybe-uninitialized -Wno-uninitialized)
mprec_isa(avx512vnni BASE avx512 CPU avx512vnni FLAGS -mavx512vnni FOR dhe dense)     # int8 layers
mprec_isa(avx512bf16 BASE avx512vnni CPU avx512bf16 FLAGS -mavx512bf16 FOR dhe dense) # bfloat16 layers
mprec_isa(amx        BASE avx512bf16 CPU amx-tile amx-int8 amx-bf16 LENT lends_tiles FOR dense)       # layers by tiles
# gcc schedules before it allocates registers there, and then spills accumulators of a matrix product's tile.
mprec_isa(neon       BASE scalar ARCH aarch64 FOR all FLAGS -fno-schedule-insns)
# The length of registers is the compiler's to know: its code is wrong where they have another. SVE's loads and
# stores are to gcc of the type that their pointers say, where other sets' may be of any.
mprec_isa(sve256     BASE neon LENT has_sve256 FOR all
                     FLAGS -march=armv8.2-a+sve+bf16 -msve-vector-bits=256 -fno-strict-aliasing)
