#include "dhe/kernel.h"

namespace mprec::scalar {
const DheKernels dhe_kernels = {encode, hash, forward, backward, pool};
}
