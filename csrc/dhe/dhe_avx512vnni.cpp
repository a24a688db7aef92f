#include "dhe/kernel.h"

namespace mprec::avx512vnni {
const DheKernels dhe_kernels = {encode, hash, forward, backward, pool};
}
