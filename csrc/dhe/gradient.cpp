#include "dhe/gradient.h"

#include <algorithm>
#include <stdexcept>

#include "bags/check.h"
#include "common/aligned.h"
#include "common/parallel.h"
#include "dhe/pack.h"
#include "registry.h"

namespace mprec {
namespace {

// Work that repays waking a thread and a second set of sums.
constexpr int64_t multiply_adds_per_thread = 1 << 22;
constexpr int64_t tile_columns = 32;  // the widest of any ISA

// Each layer's weights packed as outputs to inputs, which takes a layer's gradient to the one before it.
struct Transposed {
  std::vector<AlignedBuffer<char>> weights;
  AlignedBuffer<float> zeros;
  std::vector<LayerView> layers;

  explicit Transposed(const std::vector<LinearWeights>& linear) {
    int64_t widest = 0;
    for (const LinearWeights& w : linear) widest = std::max(widest, w.inputs);
    zeros = AlignedBuffer<float>(round_up(widest, lut_columns));
    for (size_t l = 0; l < linear.size(); ++l) {
      const LinearWeights& w = linear[l];
      weights.push_back(l == 0 ? AlignedBuffer<char>()  // hashes have no gradient
                               : pack_float32({w.weight, w.inputs, w.outputs, w.input_stride, w.output_stride,
                                               nullptr, 0}));
      layers.push_back({weights[l].data(), zeros.data(), zeros.data(), static_cast<int>(w.outputs),
                        static_cast<int>(w.inputs), Activation::none});
    }
  }
};

void check_weights(const DecoderView& view, const std::vector<LinearWeights>& linear) {
  if (view.precision != Precision::float32)
    throw std::invalid_argument("decoder: gradients need one of precision float32");
  if (static_cast<int>(linear.size()) != view.num_layers)
    throw std::invalid_argument(
        message("weights: expected the decoder's ", view.num_layers, ", got ", linear.size()));
  for (int l = 0; l < view.num_layers; ++l)
    if (linear[l].outputs != view.layers[l].outputs || linear[l].inputs != view.layers[l].inputs)
      throw std::invalid_argument(message("weights[", l, "]: expected the decoder's shape [",
                                          view.layers[l].outputs, ", ", view.layers[l].inputs, "], got [",
                                          linear[l].outputs, ", ", linear[l].inputs, "]"));
}

}  // namespace

void dhe_backward(const DecoderView& view, const std::vector<LinearWeights>& linear, const int64_t* ids,
                  int64_t n, const float* kept, int64_t kept_stride, const float* grad,
                  const std::vector<LayerGradient>& to, int threads) {
  check_weights(view, linear);
  const Transposed transposed(linear);
  check_ids({ids, n, true}, -1, "indices");
  if (n == 0) {
    for (size_t l = 0; l < linear.size(); ++l) {
      std::fill_n(to[l].weight, linear[l].outputs * linear[l].inputs, 0.0f);
      std::fill_n(to[l].bias, linear[l].outputs, 0.0f);
    }
    return;
  }

  const int64_t blocks = (n + backward_ids - 1) / backward_ids;
  threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({int64_t{threads}, blocks,
                                              3 * n * view.multiply_adds() / multiply_adds_per_thread})));
  // The first thread sums where the gradients go, if its tiles fit there; the others, and it if not, in
  // memory that the calling thread keeps: fresh pages would cost more than a small batch. Then scratch.
  int64_t sums = 0;
  std::vector<int64_t> weight_at, bias_at, pitch;
  for (const LinearWeights& w : linear) {
    pitch.push_back(round_up(w.inputs, tile_columns));
    weight_at.push_back(sums);
    bias_at.push_back(sums += w.outputs * pitch.back());
    sums += round_up(w.outputs, panel_columns);
  }
  // Activations that were not kept are made again, of as many IDs as a call takes.
  const int64_t stride = kept ? kept_stride : int64_t{backward_ids} * block_pitch;
  const int64_t again = kept ? 0 : kept_blocks(view) * stride;
  const int64_t scratch = std::max(backward_scratch_floats(view), scratch_floats(view)) + again;
  thread_local AlignedBuffer<float> own_memory;
  float* const memory = own_memory.reserve(threads * (sums + scratch));
  std::vector<WeightGradient> gradients;
  for (int part = 0; part < threads; ++part)
    for (size_t l = 0; l < linear.size(); ++l) {
      float* own = memory + part * sums;
      if (part == 0 && pitch[l] == linear[l].inputs)
        gradients.push_back({to[l].weight, pitch[l], to[l].bias, true});
      else
        gradients.push_back({own + weight_at[l], pitch[l], own + bias_at[l], true});
    }

  const auto* kernel = kernels().dhe;
  parallel_ranges(threads, threads, [&](int64_t first, int64_t end) {
    for (int64_t part = first; part < end; ++part) {
      WeightGradient* own = &gradients[part * linear.size()];
      float* own_scratch = memory + threads * sums + part * scratch;
      for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; ++b) {
        const int64_t begin = n * b / blocks, count = n * (b + 1) / blocks - begin;
        const float* activations = own_scratch;
        if (kept)
          activations = kept + begin * block_pitch;
        else
          kernel->keep(view, ids + begin, static_cast<int>(count), own_scratch, stride, own_scratch + again);
        kernel->backward(view, transposed.layers.data(), ids + begin, static_cast<int>(count), activations,
                         stride, grad + begin * view.dim, view.dim, own, own_scratch + again);
        for (size_t l = 0; l < linear.size(); ++l) own[l].fresh = false;
      }
    }
  });

  for (size_t l = 0; l < linear.size(); ++l) {
    const LinearWeights& w = linear[l];
    const auto part = [&](int i) -> const WeightGradient& { return gradients[i * linear.size() + l]; };
    if (threads == 1 && part(0).weight == to[l].weight) continue;
    parallel_ranges(w.outputs, threads, [&](int64_t first, int64_t end) {
      for (int64_t o = first; o < end; ++o) {
        float* row = to[l].weight + o * w.inputs;
        if (part(0).weight != to[l].weight) {
          std::copy_n(part(0).weight + o * pitch[l], w.inputs, row);
          to[l].bias[o] = part(0).bias[o];
        }
        for (int p = 1; p < threads; ++p) {
          const float* own = part(p).weight + o * pitch[l];
          for (int64_t i = 0; i < w.inputs; ++i) row[i] += own[i];
          to[l].bias[o] += part(p).bias[o];
        }
      }
    });
  }
}

}  // namespace mprec
