#include "embedding_bag/kernel.h"

namespace mprec::scalar {
const EmbeddingBagKernels embedding_bag_kernels = {forward};
}
