#include "dhe/gradient.h"

#include <algorithm>

#include "common/aligned.h"
#include "common/error.h"
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

}  // namespace

void dhe_backward(Encoder encoder, const std::vector<LinearWeights>& linear, Activation activation,
                  Activation last, const int64_t* ids, int64_t n, const float* grad,
                  const std::vector<LayerGradient>& to, int threads) {
  const Decoder decoder(std::move(encoder), linear, activation, last);
  const DecoderView view = decoder.view();
  const Transposed transposed(linear);
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0) throw IdError(message("indices[", i, "] is ", ids[i], ", expected >= 0"));

  const int64_t blocks = (n + max_ids - 1) / max_ids;
  threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({int64_t{threads}, blocks,
                                              3 * n * view.multiply_adds() / multiply_adds_per_thread})));
  // Every thread's sums, zero at first, then every thread's scratch. Kept by the calling thread: fresh pages
  // would cost more than a small batch.
  int64_t sums = 0;
  std::vector<int64_t> weight_at, bias_at, pitch;
  for (const LinearWeights& w : linear) {
    pitch.push_back(round_up(w.inputs, tile_columns));
    weight_at.push_back(sums);
    bias_at.push_back(sums += round_up(w.outputs, panel_columns) * pitch.back());
    sums += round_up(w.outputs, panel_columns);
  }
  const int64_t scratch = backward_scratch_floats(view);
  thread_local AlignedBuffer<float> own_memory;
  float* const memory = own_memory.reserve(threads * (sums + scratch));
  std::vector<WeightGradient> gradients(threads * linear.size());

  const auto* kernel = kernels().dhe;
  parallel_ranges(threads, threads, [&](int64_t first, int64_t end) {
    for (int64_t part = first; part < end; ++part) {
      float* own = memory + part * sums;
      std::fill_n(own, sums, 0.0f);
      WeightGradient* own_sums = &gradients[part * linear.size()];
      for (size_t l = 0; l < linear.size(); ++l)
        own_sums[l] = {own + weight_at[l], pitch[l], own + bias_at[l]};
      float* own_scratch = memory + threads * sums + part * scratch;
      for (int64_t b = blocks * part / threads; b < blocks * (part + 1) / threads; ++b) {
        const int64_t begin = n * b / blocks, count = n * (b + 1) / blocks - begin;
        kernel->backward(view, transposed.layers.data(), ids + begin, static_cast<int>(count),
                         grad + begin * view.dim, view.dim, own_sums, own_scratch);
      }
    }
  });

  for (size_t l = 0; l < linear.size(); ++l) {
    const LinearWeights& w = linear[l];
    parallel_ranges(w.outputs, threads, [&](int64_t first, int64_t end) {
      for (int64_t o = first; o < end; ++o) {
        float* row = to[l].weight + o * w.inputs;
        to[l].bias[o] = memory[bias_at[l] + o];
        std::copy_n(memory + weight_at[l] + o * pitch[l], w.inputs, row);
        for (int part = 1; part < threads; ++part) {
          const float* own = memory + part * sums;
          for (int64_t i = 0; i < w.inputs; ++i) row[i] += own[weight_at[l] + o * pitch[l] + i];
          to[l].bias[o] += own[bias_at[l] + o];
        }
      }
    });
  }
}

}  // namespace mprec
