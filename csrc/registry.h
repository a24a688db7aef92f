// One table of function pointers per ISA; one of them is in use.
#pragma once
#include "common/cpu.h"

namespace mprec {

struct EmbeddingBagKernels;  // embedding_bag/embedding_bag.h
struct GradientKernels;      // gradient/gradient.h
struct DheKernels;           // dhe/dhe.h
struct DenseKernels;         // dense/dense.h

struct Kernels {
  Isa isa;
  const EmbeddingBagKernels* embedding_bag;
  const GradientKernels* gradient;
  const DheKernels* dhe;
  const DenseKernels* dense;
};

// The table in use: the best the CPU can run, until use_isa says otherwise.
const Kernels& kernels();
// Switches the table in use (MPREC_ISA, tests, benchmarks). std::invalid_argument if this CPU cannot run it.
void use_isa(Isa);

}  // namespace mprec
