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

// The vectors of samples begin ..., in one piece for each of them: where they lie, or copied to `block`.
const float* together(const InteractionView& view, const Vectors& vectors, int64_t begin, int samples,
                      float* block) {
  const int64_t dim = view.dim, others = (view.vectors - 1) * dim;
  if (!vectors.first) return vectors.others + begin * (others + dim);
  for (int64_t s = 0; s < samples; ++s) {
    float* const sample = block + s * (others + dim);
    std::copy_n(vectors.first + (begin + s) * dim, dim, sample);
    std::copy_n(vectors.others + (begin + s) * others, others, sample + dim);
  }
  return block;
}

// The vectors of one sample.
template <class Number>
VectorsOf<Number> sample_of(const InteractionView& view, const VectorsOf<Number>& vectors, int64_t s) {
  const int64_t dim = view.dim, others = (view.vectors - 1) * dim;
  if (vectors.first) return {vectors.first + s * dim, vectors.others + s * others};
  Number* const all = vectors.others + s * (others + dim);
  return {all, all + dim};
}

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

void interaction_forward(const InteractionView& view, const Vectors& vectors, int64_t samples, Rows out,
                         int threads) {
  const DenseKernels& k = *kernels().dense;
  const int64_t products = view.products(), stride = int64_t{view.vectors} * view.dim;
  const int in_front = vectors.first ? view.dim : 0, columns = in_front + static_cast<int>(products);
  const int64_t activations = blocks_of(columns) * sample_block_stride + 16;
  const int64_t transposed = activations + (vectors.first ? max_samples * stride : 0);
  parallel_ranges(samples, team(samples * products * view.dim, threads), [&](int64_t first, int64_t last) {
    float* const blocks = scratch.reserve(transposed + view.transposed_floats());
    in_blocks(first, last, [&](int64_t begin, int count) {
      const float* const some = together(view, vectors, begin, count, blocks + activations);
      if (in_front) k.gather(some, stride, count, view.dim, blocks, sample_block_stride, 0);
      k.interact(view, some, stride, count, blocks + transposed, blocks, sample_block_stride, in_front);
      k.scatter(blocks, sample_block_stride, count, columns, out.data + begin * out.stride, out.stride);
    });
  });
}

void interaction_backward(const InteractionView& view, const Vectors& vectors, const float* grad,
                          int64_t samples, const VectorsOf<float>& out, int threads) {
  const DenseKernels& k = *kernels().dense;
  const int64_t products = view.products(), in_front = vectors.first ? view.dim : 0;
  parallel_ranges(samples, team(2 * samples * products * view.dim, threads), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const float* const own = grad + s * (in_front + products);  // of the first vector itself
      const VectorsOf<float> into = sample_of(view, out, s);
      k.interact_backward(view, sample_of(view, vectors, s), own + in_front, into);
      for (int64_t d = 0; d < in_front; ++d) into.first[d] += own[d];
    }
  });
}

}  // namespace mprec
