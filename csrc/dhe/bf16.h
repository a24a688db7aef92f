// Products of bfloat16 numbers, added up in float32: weights, and the inputs of every layer, rounded to
// nearest.
//
// Weights are packed in pairs of inputs, [outputs / 16][inputs / 2][16][2], for the instruction that
// multiplies pairs. An ISA without it multiplies the same rounded numbers in float32.
#pragma once
#include "dhe/gemm.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

struct BFloatProduct {
  using Weight = uint16_t;
  using Sum = Vec;
  static constexpr int group = 2, pad = bfloat16_pad, block = block_columns;
  static constexpr int weight_pitch = 2 * panel_columns, step_pitch = 2;
  static Vec zero() { return MPREC_ISA::zero(); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec start(Vec before) { return before; }
  template <class Columns>
  static Vec finish(const Columns&, Vec sum, Vec, int, int) {
    return sum;
  }
  static constexpr bool prepares_rows = false;

#if defined(MPREC_DOT2)  // isa/ISA.h has the instruction
  using Input = uint16_t;
  static constexpr int row_pitch = 2 * block_pitch;
  static constexpr int unpack_rows = never;
  static Vec broadcast_input(const uint16_t* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return from_bits(broadcast_int(pair));
  }
  static Vec load_weights(const uint16_t* p) { return from_bits(load(reinterpret_cast<const uint32_t*>(p))); }
  static Vec multiply_add(Vec a, Vec w, Vec sum) { return dot2(sum, a, w); }
  // Rounds a block of float32 inputs in place: each row's numbers move to its first half. Zeros where a panel
  // has padding: past the inputs may be anything.
  static const uint16_t* prepare(float* block, int rows, int inputs) {
    for (int r = 0; r < rows; ++r) {
      float* row = block + r * block_pitch;
      auto* to = reinterpret_cast<BFloat*>(row);
      for (int j = 0; j < inputs; j += Vec::width) store(to + j, load(row + j));
      for (int j = inputs; j % pad; ++j) to[j].bits = 0;
    }
    return reinterpret_cast<const uint16_t*>(block);
  }
  // What a tile's sum (dense/tiles.h) makes of the output.
  template <class Columns>
  static Vec of_tile(const Columns&, Int sum, Vec bias, int) {
    return from_bits(sum) + bias;
  }
#else
  using Input = float;
  static constexpr int row_pitch = block_pitch;
  static constexpr int unpack_rows = 0;
  static const float* prepare(float* block, int rows, int inputs) {
    for (int r = 0; r < rows; ++r) {
      float* row = block + r * block_pitch;
      for (int j = 0; j < inputs; j += Vec::width) store(row + j, rounded(load(row + j)));
      if (inputs % 2) row[inputs] = 0;
    }
    return block;
  }
  static Vec rounded(Vec a) {
    BFloat one[Vec::width];
    store(one, a);
    return load(one);
  }
  // `vectors` vectors of columns of so many pairs of inputs, to [input][panel_columns].
  static void unpack(const uint16_t* weights, int pairs, int vectors, float* out) {
    for (int k = 0; k < pairs; ++k, weights += weight_pitch, out += 2 * panel_columns)
      for (int v = 0; v < vectors; ++v) {
        const Int two = load_pairs(weights + 2 * v * Vec::width);
        store(out + v * Vec::width, from_bits(two << 16));
        store(out + panel_columns + v * Vec::width, from_bits(two & broadcast_int(0xffff0000u)));
      }
  }
  static Int load_pairs(const uint16_t* p) { return load(reinterpret_cast<const uint32_t*>(p)); }
#endif
};

}  // namespace mprec::MPREC_ISA
