// Deep hash embedding: k hashes of an ID, decoded by an MLP into its vector. What the kernels see: plain
// pointers and sizes. The formulas are in README.md beside this file.
#pragma once
#include <cstdint>

#include "bags/bags.h"
#include "dhe/families.h"
#include "isa/slots.h"

// Functions here that kernels call are always inlined: an emitted copy could be one ISA's, taken for all.
namespace mprec {

enum class Activation : int { none = 0, relu = 1, sigmoid = 2, mish = 3 };

constexpr int64_t mersenne_p = 2147483647;  // 2^31 - 1: universal, sign, u7
constexpr int64_t artifact_p = 1000003, artifact_m = 1000000;
constexpr float sign_magnitude = 0.57735026918962576f;  // 1 / sqrt(3): the uniform encoding's variance

// Rows of k_padded words. universal, sign, u7: 2a 2b 2c 2d, by hash_slot. artifact: a, b, and the floats a/p,
// b/p, in order.
struct EncoderView {
  const uint32_t* rows;
  int k, k_padded;  // k_padded: a multiple of 16, the rest zeros
  HashFamily family;
  [[gnu::always_inline]] const uint32_t* row(int i) const {
    return rows + static_cast<int64_t>(i) * k_padded;
  }
};

// How weights are stored and multiplied. float16: float16 weights, float32 arithmetic. bfloat16: bfloat16
// weights and inputs of every layer, float32 sums (bf16.h). The others change the first layer only, which has
// most of the weights. int8: int8.h; lut: lut.h; for families with int8_unit or lut_magnitude.
enum class Precision : int { float32 = 0, float16 = 1, int8 = 2, lut = 3, bfloat16 = 4 };

// out = activation(weight in + bias).
constexpr int panel_columns = 16;  // of float and int8 weights
constexpr int lut_columns = 64;    // of look-up tables
// The inputs of a panel are padded to a multiple: what a tile of AMX takes.
constexpr int bfloat16_pad = 32, int8_pad = 64;
struct LayerView {
  // Zero-padded panels. float: [outputs / 16][inputs][16]; bfloat16: [outputs / 16][inputs / 2][16][2]; int8:
  // [outputs / 16][inputs / 4][16][4]; look-up tables: [outputs / 64][inputs / 4][16][64].
  const void* weights;
  const float* scale;  // int8 and look-up tables: what a sum is multiplied by
  const float* bias;   // as scale, padded with zeros to 64 columns
  int inputs, outputs;
  Activation activation;
  const float* shift = nullptr;  // int8 of dense layers: what a sample's offset is multiplied by
};

struct DecoderView {
  EncoderView encoder;
  const LayerView* layers;
  int num_layers;
  int dim;     // outputs of the last layer
  int widest;  // outputs of the widest layer
  Precision precision;
  int64_t multiply_adds() const {  // per ID
    int64_t sum = 0;
    for (int l = 0; l < num_layers; ++l) sum += int64_t{layers[l].inputs} * layers[l].outputs;
    return sum;
  }
};

// Activations between layers lie in blocks of `block_columns` columns: [block][row][block_pitch]. The pitch
// is a constant so that a row of a tile is a constant offset in the microkernel, and no power of two so that
// rows do not share cache sets.
constexpr int block_columns = 256, block_pitch = block_columns + 16;
// IDs that one call of `forward` takes: their block of hashes (73 KiB) and the activations of a layer of 512
// stay in a 512 KiB L2 cache beside the weights that stream through. Whole tiles of 6 and nearly of 14 rows.
constexpr int max_ids = 66;

[[gnu::always_inline]] constexpr int blocks_of(int columns) {
  return (columns + block_columns - 1) / block_columns;
}
// int8 inputs: as many bytes as a block of floats has.
constexpr int level_columns = 4 * block_columns, level_pitch = 4 * block_pitch;
// Look-up tables: for each ID 16 bits for each four hashes, and two rows of sums.
[[gnu::always_inline]] inline int64_t offset_pitch(const DecoderView& d) { return d.encoder.k_padded / 4; }

// Floats of scratch for one thread: one block of hashes and two layers' activations.
inline int64_t scratch_floats(const DecoderView& d) {
  const int64_t look_up = d.precision == Precision::lut ? max_ids * (offset_pitch(d) / 2 + 64) : 0;
  return int64_t{max_ids} * block_pitch * (1 + 2 * blocks_of(d.widest)) + look_up + 64;
}

// Sums of one layer's gradients: weight [outputs][pitch], bias [outputs].
struct WeightGradient {
  float* weight;
  int64_t pitch;  // at least inputs rounded up to a tile's columns
  float* bias;
  bool fresh;  // the sums are what this call gives; else it adds to them
};

// The activations of every layer, as training keeps them: blocks [kept_blocks][ids][block_pitch], of layer
// after layer. Of a layer's sums z and values y there is y alone where that tells the activation's slope.
[[gnu::always_inline]] inline bool keeps_sums(const LayerView& layer) {
  return layer.activation == Activation::mish;
}
inline int64_t kept_blocks(const DecoderView& d) {
  int64_t blocks = 0;
  for (int l = 0; l < d.num_layers; ++l)
    blocks += (keeps_sums(d.layers[l]) ? 2 : 1) * blocks_of(d.layers[l].outputs);
  return blocks;
}

// IDs that one call of `backward` takes. Each call reads and writes all sums of the gradients, which are as
// large as the weights: the more IDs the better, while a layer's gradients stay in the L2 cache.
constexpr int backward_ids = 2 * max_ids;

// Floats of scratch for the gradients: a block of hashes and two layers' gradients.
inline int64_t backward_scratch_floats(const DecoderView& d) {
  return int64_t{backward_ids} * block_pitch * (1 + 2 * blocks_of(d.widest)) + 64;
}

struct PoolArguments {
  const float* vectors;  // [rows, dim]
  int64_t dim;
  const int32_t*
      row_of_entry;      // entry i's vector is vectors[row_of_entry[i]], or it is padding (-1); null: i
  const float* weights;  // null: ones
  Mode mode;
};

struct DheKernels {
  // u of n IDs, all >= 0, into out[i * stride + j], j < k.
  void (*encode)(const EncoderView&, const int64_t* ids, int64_t n, float* out, int64_t stride);
  // h of n IDs into out[i * k + j].
  void (*hash)(const EncoderView&, const int64_t* ids, int64_t n, int64_t* out);
  // The vectors of n <= max_ids IDs into out[i * stride + j], j < dim.
  void (*forward)(const DecoderView&, const int64_t* ids, int n, float* out, int64_t stride, float* scratch);
  // The activations of n IDs into `kept`, whose blocks are `block_stride` apart. Scratch as for `forward`.
  void (*keep)(const DecoderView&, const int64_t* ids, int n, float* kept, int64_t block_stride,
               float* scratch);
  // Sums the gradients that the vectors of n <= backward_ids IDs pass on in `to[l]`, for every layer l;
  // `kept` as `keep` gave it. Row i of the vectors' gradient is grad[i * stride]. float32 weights;
  // transposed[l] (l > 0) has the layer's weights packed as outputs to inputs, with a zero bias and no
  // activation.
  void (*backward)(const DecoderView&, const LayerView* transposed, const int64_t* ids, int n,
                   const float* kept, int64_t block_stride, const float* grad, int64_t stride,
                   const WeightGradient* to, float* scratch);
  // One bag: entries [begin, end) into out[0, dim).
  void (*pool)(const PoolArguments&, int64_t begin, int64_t end, float* out);
};

}  // namespace mprec
