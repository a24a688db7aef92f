#include "dense/kernel.h"

namespace mprec::scalar {
const DenseKernels dense_kernels = {gather, scatter, mlp, interact, interact_backward, mix};
}
