// Dense layers in int8: inputs as levels 0 ... 127, by a step and an offset of each sample; weights as
// -127 ... 127, by a step of each output; products and sums are integers.
//
//     x ~ low + step level      w ~ scale q      sum w x ~ scale step (sum q level) + low scale (sum q)
//
// 7 bits, because the product of AVX2 adds pairs in 16 bits, and every ISA is to give the same integers. The
// range of a sample's inputs is taken to have 0 in it.
#pragma once
#include "dhe/int8.h"

namespace mprec::MPREC_ISA {

// A sample's inputs stand in its row of a block, 1024 levels from each fourth block of floats on, and behind
// them, where a row of floats has its padding, what they mean.
struct LevelMeaning {
  float step, low;
};

inline LevelMeaning meaning(const float* row, int inputs, int64_t block_stride) {
  Vec least = zero(), most = zero(), faults = zero();
  const auto see = [&](Vec x) {
    least = lesser(x, least);
    most = greater(x, most);
    faults = fma(x, zero(), faults);  // NaN of infinity and NaN
  };
  for (int k0 = 0; k0 < inputs; k0 += block_columns, row += block_stride) {
    const int count = inputs - k0 < block_columns ? inputs - k0 : block_columns;
    int k = 0;
    for (; k + Vec::width <= count; k += Vec::width) see(load(row + k));
    if (k < count) see(load(row + k, Mask(count - k)));
  }
  float lows[Vec::width], highs[Vec::width];
  store(lows, least);
  store(highs, most);
  float low = 0.0f, high = 0.0f;
  for (int i = 0; i < Vec::width; ++i) {
    low = lows[i] < low ? lows[i] : low;
    high = highs[i] > high ? highs[i] : high;
  }
  const float fault = sum(faults);
  return {(high - low) / 127.0f + fault, low + fault};
}

inline void quantise_row(float* row, int inputs, int64_t block_stride) {
  const LevelMeaning m = meaning(row, inputs, block_stride);
  const float range = m.step * 127.0f;
  const Vec per_level = broadcast(range > 1e-30f ? 127.0f / range : 0.0f), low = broadcast(m.low);
  for (int k0 = 0; k0 < inputs; k0 += block_columns) {
    const float* const from = row + k0 / block_columns * block_stride;
    auto* const to =
        reinterpret_cast<uint8_t*>(row + k0 / level_columns * 4 * block_stride) + k0 % level_columns;
    const int count = inputs - k0 < block_columns ? inputs - k0 : block_columns;
    // The levels of a register are written where floats were that have been read.
    for (int k = 0; k < count; k += Vec::width)
      store_bytes(to + k, round_to_int((load(from + k) - low) * per_level));
  }
  for (int k0 = 0; k0 < inputs; k0 += level_columns)
    __builtin_memcpy(reinterpret_cast<char*>(row + k0 / block_columns * block_stride) + level_columns, &m,
                     sizeof m);
}

struct QuantisedProduct : Int8Product {
  static constexpr bool prepares_rows = true;
  template <class Columns>
  static Vec finish(const Columns& c, Int sum, Vec before, int row, int vector) {
    LevelMeaning m;
    __builtin_memcpy(&m, c.in + row * row_pitch + level_columns, sizeof m);
    const Vec y = fma(broadcast(m.step), to_float(sum) * load(c.scale + vector * Vec::width), before);
    return c.first ? fma(broadcast(m.low), load(c.shift + vector * Vec::width), y) : y;
  }
  template <class Columns>
  static Vec of_tile(const Columns& c, Int sum, Vec bias, int row) {
    return finish(c, sum, bias, row, 0);
  }
  // Whole rows of inputs, in place. One that is not finite makes all outputs of its sample NaN.
  static void prepare(float* in, int rows, int inputs, int64_t block_stride) {
    for (int r = 0; r < rows; ++r) quantise_row(in + r * block_pitch, inputs, block_stride);
  }
};

}  // namespace mprec::MPREC_ISA
