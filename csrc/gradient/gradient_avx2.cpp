#include "gradient/kernel.h"

namespace mprec::avx2 {
const GradientKernels gradient_kernels = {apply};
}
