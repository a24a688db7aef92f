// A first layer in int8: the hashes' top 7 bits, 0 ... 127, times weights -127 ... 127 in int32.
//
// u = (2 level - 127) / 127, so sum w u = scale * sum q level + offset with w = q w_max / 127 (decoder.cpp
// folds the offset into the bias). 7 bits, because the product of AVX2 adds pairs in 16 bits: 2 * 127 * 127
// fits.
#pragma once
#include "dhe/gemm.h"
#include "dhe/hash.h"

namespace mprec::MPREC_ISA {

struct Int8Product {
  using Input = uint8_t;
  using Weight = int8_t;
  using Sum = Int;
  static constexpr int group = 4, pad = int8_pad, block = level_columns;
  static constexpr int row_pitch = level_pitch, step_pitch = 4;
  static constexpr int weight_pitch = panel_columns * 4;
  static constexpr int unpack_rows = never;
  static Int zero() { return broadcast_int(0); }
  static Int broadcast_input(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return broadcast_int(four);
  }
  static Int load_weights(const int8_t* p) { return load(reinterpret_cast<const uint32_t*>(p)); }
  static Int multiply_add(Int levels, Int w, Int sum) { return dot4(sum, levels, w); }
  static Int add(Int a, Int b) { return a + b; }
  static Int start(Vec) { return zero(); }
  template <class Columns>
  static Vec finish(const Columns& c, Int sum, Vec before, int, int vector) {
    return fma(to_float(sum), load(c.scale + vector * Vec::width), before);
  }
};

struct StoreLevels {
  uint8_t* out;
  int64_t stride;
  void operator()(int64_t i, int j, Int h) const { store_bytes(out + i * stride + j, h >> 24); }
};

}  // namespace mprec::MPREC_ISA
