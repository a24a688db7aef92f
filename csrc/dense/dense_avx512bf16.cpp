#include "dense/kernel.h"

namespace mprec::avx512bf16 {
const DenseKernels dense_kernels = {gather, scatter, mlp, interact, interact_backward, mix};
}
