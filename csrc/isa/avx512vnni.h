// AVX-512 with VNNI.
#pragma once
#define MPREC_ISA avx512vnni
#include "isa/avx512_base.h"
#include "isa/vnni.h"
