#include "registry.h"

#include <atomic>
#include <stdexcept>

#include "common/error.h"
#include "dense/dense.h"
#include "dhe/dhe.h"
#include "embedding_bag/embedding_bag.h"
#include "gradient/gradient.h"

namespace mprec {
namespace {

#define MPREC_KERNELS(isa) \
  {Isa::isa, &isa::embedding_bag_kernels, &isa::gradient_kernels, &isa::dhe_kernels, &isa::dense_kernels}
const Kernels tables[] = {MPREC_KERNELS(scalar),
                          MPREC_KERNELS(avx2),
                          MPREC_KERNELS(avx512),
                          // VNNI is for dhe's int8, BF16 for bfloat16.
                          {Isa::avx512vnni, &avx512::embedding_bag_kernels, &avx512::gradient_kernels,
                           &avx512vnni::dhe_kernels, &avx512::dense_kernels},
                          {Isa::avx512bf16, &avx512::embedding_bag_kernels, &avx512::gradient_kernels,
                           &avx512bf16::dhe_kernels, &avx512bf16::dense_kernels}};
#undef MPREC_KERNELS

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
