#include "embedding_bag/kernel.h"

namespace mprec::avx2 {
const EmbeddingBagKernels embedding_bag_kernels = {forward};
}
