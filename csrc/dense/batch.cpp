#include "dense/batch.h"

#include <algorithm>

#include "common/aligned.h"
#include "common/parallel.h"
#include "registry.h"

namespace mprec {
namespace {

// Work that repays waking a thread: some 20 microseconds.
constexpr int64_t multiply_adds_per_thread = 1 << 21;

int team(int64_t multiply_adds, int threads) {
  return static_cast<int>(std::clamp<int64_t>(multiply_adds / multiply_adds_per_thread, 1, threads));
}

// Runs body(begin, samples) for blocks of at most max_samples of [begin, end).
template <class Body>
void in_blocks(int64_t begin, int64_t end, const Body& body) {
  for (; begin < end; begin += max_samples)
    body(begin, static_cast<int>(std::min<int64_t>(max_samples, end - begin)));
}

thread_local AlignedBuffer<float> scratch;  // kept by each thread, so that calls do not allocate

}  // namespace

void mlp_forward(const MlpView& mlp, Rows in, int64_t samples, Rows out, int threads) {
  const DenseKernels& k = *kernels().dense;
  const int inputs = mlp.layers[0].inputs, outputs = mlp.layers[mlp.num_layers - 1].outputs;
  const int64_t activations = blocks_of(mlp.widest) * sample_block_stride + 16;
  static thread_local bool forwards;
  const bool backwards = forwards = !forwards;
  parallel_ranges(samples, team(samples * mlp.multiply_adds(), threads), [&](int64_t first, int64_t last) {
    float* const blocks = scratch.reserve(2 * activations);
    in_blocks(first, last, [&](int64_t begin, int count) {
      k.gather(in.data + begin * in.stride, in.stride, count, inputs, blocks, sample_block_stride, 0);
      const float* result = k.mlp(mlp, count, backwards, blocks, blocks + activations, sample_block_stride);
      k.scatter(result, sample_block_stride, count, outputs, out.data + begin * out.stride, out.stride);
    });
  });
}

void interaction_forward(const InteractionView& view, const float* vectors, int64_t samples, Rows out,
                         int threads) {
  const DenseKernels& k = *kernels().dense;
  const int64_t products = view.products(), stride = int64_t{view.vectors} * view.dim;
  const int64_t activations = blocks_of(static_cast<int>(products)) * sample_block_stride + 16;
  parallel_ranges(samples, team(samples * products * view.dim, threads), [&](int64_t first, int64_t last) {
    float* const blocks = scratch.reserve(activations + view.transposed_floats());
    in_blocks(first, last, [&](int64_t begin, int count) {
      k.interact(view, vectors + begin * stride, stride, count, blocks + activations, blocks,
                 sample_block_stride, 0);
      k.scatter(blocks, sample_block_stride, count, static_cast<int>(products), out.data + begin * out.stride,
                out.stride);
    });
  });
}

void interaction_backward(const InteractionView& view, const float* vectors, const float* grad,
                          int64_t samples, float* out, int threads) {
  const DenseKernels& k = *kernels().dense;
  const int64_t products = view.products(), stride = int64_t{view.vectors} * view.dim;
  parallel_ranges(samples, team(2 * samples * products * view.dim, threads), [&](int64_t begin, int64_t end) {
    k.interact_backward(view, vectors + begin * stride, grad + begin * products, end - begin,
                        scratch.reserve(view.symmetric_floats()), out + begin * stride);
  });
}

}  // namespace mprec
