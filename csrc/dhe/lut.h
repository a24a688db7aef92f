// A first layer of sign hashes by table look-up: four signs select one of 16 sums of +-w, in 8 bits.
//
// Tables are packed [outputs / 64][k / 4][16][64] bytes: an entry is one cache line, which holds 64 outputs'
// sums. A line of 32 16-bit words is added to two sums: as it is, and shifted right by 8. The second sum is
// the odd bytes', the first minus 256 times the second (modulo 2^16) the even bytes'. So 4 x 64 multiply-adds
// cost a load, a shift and two additions. 16 bits hold 256 groups of entries up to 255; then the sums are
// scaled and added to the output. Column c of a chunk is byte 2c of a line if c < 32, else 2(c - 32) + 1.
#pragma once
#include "dhe/gemm.h"
#include "dhe/hash.h"

namespace mprec::MPREC_ISA {

constexpr int lut_block = 32;   // groups whose tables (32 KiB) stay in the L1 cache while IDs pass
constexpr int lut_few = 12;     // IDs that do not need most of a block
constexpr int lut_ahead = 24;   // groups for which their lines are fetched ahead
constexpr int lut_flush = 256;  // groups that 16 bits hold
constexpr int lut_line = lut_columns;

// 32 words in registers of the ISA.
constexpr int word_bytes = Vec::width == 1 ? 16 : 4 * Vec::width, line_vectors = 64 / word_bytes;
typedef uint16_t WordVector __attribute__((vector_size(word_bytes), aligned(1), may_alias));
struct Words {
  WordVector v[line_vectors];
};

// Writes, for each group of four hashes, its code times 64: where its line is in the group's table.
struct StoreOffsets {
  uint16_t* out;
  int64_t stride;
  void operator()(int64_t i, int j, Int h) const { store_sign_codes(out + i * stride, j, h); }
};

// Adds 64 columns of the scaled sums to out, or sets them.
inline void add_sums(Words even, Words odd, const float* scale, const float* bias, bool accumulate,
                     float* out) {
  alignas(64) uint16_t sums[64];
  for (int v = 0; v < line_vectors; ++v) even.v[v] -= odd.v[v] << 8;
  __builtin_memcpy(sums, &even, 64);
  __builtin_memcpy(sums + 32, &odd, 64);
  for (int c = 0; c < lut_columns; ++c) {
    const float y = static_cast<float>(sums[c]) * scale[c];
    out[c] = y + (accumulate ? out[c] : 0.0f) + (bias ? bias[c] : 0.0f);
  }
}

// Adds the lines of `count` groups to an ID's sums. `fetch`: of the `left` groups that the columns still
// have, fetches the line that is `lut_ahead` groups ahead.
template <bool fetch>
inline void add_lines(const uint8_t* table, const uint16_t* offset, int count, int left, Words& even_sum,
                      Words& odd_sum) {
  Words even = even_sum, odd = odd_sum;
  for (int g = 0; g < count; ++g, table += 16 * lut_line) {
    if (fetch && g + lut_ahead < left) prefetch(table + lut_ahead * 16 * lut_line + offset[g + lut_ahead]);
    const auto* line = reinterpret_cast<const WordVector*>(table + offset[g]);
#pragma GCC unroll 4
    for (int v = 0; v < line_vectors; ++v) {
      const WordVector words = line[v];
      even.v[v] += words;
      odd.v[v] += words >> 8;
    }
  }
  even_sum = even;
  odd_sum = odd;
}

// `offsets` [rows][stride] to the first layer's outputs.
inline void look_up(const LayerView& layer, const uint16_t* offsets, int64_t stride, int rows, Words* sums,
                    float* out, int64_t block_stride) {
  const int groups = (layer.inputs + 3) / 4;
  for (int column = 0; column < layer.outputs; column += lut_columns) {
    const uint8_t* tables =
        static_cast<const uint8_t*>(layer.weights) + int64_t{column} / lut_columns * groups * 16 * lut_line;
    for (int first = 0; first < groups; first += lut_flush) {
      const int end = first + lut_flush < groups ? first + lut_flush : groups;
      for (int r = 0; r < 2 * rows; ++r) sums[r] = Words{};
      for (int g0 = first; g0 < end; g0 += lut_block) {
        const int count = end - g0 < lut_block ? end - g0 : lut_block;
        const uint8_t* table = tables + int64_t{g0} * 16 * lut_line;
        if (rows < lut_few) {
          for (int r = 0; r < rows; ++r)
            add_lines<true>(table, offsets + r * stride + g0, count, groups - g0, sums[2 * r],
                            sums[2 * r + 1]);
          continue;
        }
        // The next block's tables are fetched meanwhile: these IDs are enough to need most of them.
        const uint8_t* next = table + lut_block * 16 * lut_line;
        const int ahead = lut_block * 16 / rows + 1;
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < ahead; ++i) prefetch(next + (r * ahead + i) * lut_line);
          add_lines<false>(table, offsets + r * stride + g0, count, 0, sums[2 * r], sums[2 * r + 1]);
        }
      }
      float* to = out + column / block_columns * block_stride + column % block_columns;
      for (int r = 0; r < rows; ++r)
        add_sums(sums[2 * r], sums[2 * r + 1], layer.scale + column,
                 end == groups ? layer.bias + column : nullptr, first > 0, to + r * block_pitch);
    }
  }
  activate_layer(layer, rows, out, block_stride);
}

}  // namespace mprec::MPREC_ISA
