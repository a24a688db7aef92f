#include "dhe/kernel.h"

namespace mprec::avx512bf16 {
const DheKernels dhe_kernels = {encode, hash, forward, backward, pool};
}
