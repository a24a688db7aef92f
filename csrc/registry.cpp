#include "registry.h"

#include <atomic>
#include <stdexcept>

#include "common/error.h"
#include "dense/dense.h"
#include "dhe/dhe.h"
#include "embedding_bag/embedding_bag.h"
#include "gradient/gradient.h"

namespace mprec {

// Defined at the end of each family's kernel.h, where that is compiled for the ISA. Those that are not are
// never used.
#define MPREC_DECLARE(isa, ...)                           \
  namespace isa {                                         \
  extern const EmbeddingBagKernels embedding_bag_kernels; \
  extern const GradientKernels gradient_kernels;          \
  extern const DheKernels dhe_kernels;                    \
  extern const DenseKernels dense_kernels;                \
  }
MPREC_KERNEL_TABLES(MPREC_DECLARE)
#undef MPREC_DECLARE

namespace {

// In the order of CMakeLists.txt's MPREC_FAMILIES.
const Kernels tables[] = {
#define MPREC_TABLE(isa, embedding_bag, gradient, dhe, dense)                                       \
  {Isa::isa, &embedding_bag::embedding_bag_kernels, &gradient::gradient_kernels, &dhe::dhe_kernels, \
   &dense::dense_kernels},
    MPREC_KERNEL_TABLES(MPREC_TABLE)
#undef MPREC_TABLE
};

const Kernels* best() {
  const Kernels* found = tables;
  for (const Kernels& table : tables)
    if (can_run(table.isa)) found = &table;
  return found;
}

std::atomic<const Kernels*> in_use{best()};

}  // namespace

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

void use_isa(Isa isa) {
  if (!can_run(isa))
    throw std::invalid_argument(
        message("isa: '", isa_name(isa), "' cannot run on this CPU (", cpu_model(), ")"));
  in_use.store(&tables[static_cast<int>(isa)], std::memory_order_relaxed);
}

}  // namespace mprec
