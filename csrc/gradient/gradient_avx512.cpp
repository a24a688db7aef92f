#include "gradient/kernel.h"

namespace mprec::avx512 {
const GradientKernels gradient_kernels = {apply};
}
