#pragma once
namespace mprec {
struct EmbeddingBagKernels {};
}  // namespace mprec
