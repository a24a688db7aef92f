#include "gradient/kernel.h"

namespace mprec::scalar {
const GradientKernels gradient_kernels = {apply};
}
