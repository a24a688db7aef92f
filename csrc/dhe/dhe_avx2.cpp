#include "dhe/kernel.h"

namespace mprec::avx2 {
const DheKernels dhe_kernels = {encode, hash, forward, backward, pool};
}
