#include "embedding_bag/kernel.h"

namespace mprec::avx512 {
const EmbeddingBagKernels embedding_bag_kernels = {forward};
}
