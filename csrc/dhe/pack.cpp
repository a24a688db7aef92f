#include "dhe/pack.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa/isa.h"

namespace mprec {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// [outputs / 16][inputs / group][16][group] of T, zeros beyond the last output and input.
template <class T, int group = 1, int pad = group, class Convert>
AlignedBuffer<char> pack_panels(const LinearWeights& w, const Convert& convert) {
  const int64_t inputs = round_up(w.inputs, pad);
  AlignedBuffer<char> buffer(round_up(w.outputs, panel_columns) * inputs * static_cast<int64_t>(sizeof(T)));
  T* panels = reinterpret_cast<T*>(buffer.data());
  // A few inputs of 16 outputs at a time: the panel is written in order, and the rows are read in lines.
  constexpr int64_t strip = 16;
  for (int64_t o0 = 0; o0 < w.outputs; o0 += panel_columns) {
    T* panel = panels + o0 * inputs;
    const int64_t columns = std::min<int64_t>(panel_columns, w.outputs - o0);
    if (w.output_stride == 1 && group == 1) {  // transposed weights: whole lines
      for (int64_t i = 0; i < w.inputs; ++i) {
        const float* line = w.weight + o0 + i * w.input_stride;
        for (int64_t c = 0; c < columns; ++c) panel[i * panel_columns + c] = convert(line[c]);
      }
      continue;
    }
    for (int64_t i0 = 0; i0 < w.inputs; i0 += strip)
      for (int64_t c = 0; c < columns; ++c) {
        const float* row = w.weight + (o0 + c) * w.output_stride;
        for (int64_t i = i0; i < std::min(i0 + strip, w.inputs); ++i)
          panel[(i / group * panel_columns + c) * group + i % group] = convert(row[i * w.input_stride]);
      }
  }
  return buffer;
}

template <class T>
T narrowed(float x) {
  T rounded;
  scalar::narrow(x, &rounded);
  return rounded;
}

// One output's weights, and the largest magnitude; NaN if one is not finite.
float copy_row(const LinearWeights& w, int64_t output, std::vector<float>& row) {
  float largest = 0.0f;
  for (int64_t i = 0; i < w.inputs; ++i) {
    row[i] = w.weight[output * w.output_stride + i * w.input_stride];
    if (!std::isfinite(row[i])) return nan;
    largest = std::max(largest, std::fabs(row[i]));
  }
  return largest;
}

}  // namespace

AlignedBuffer<char> pack_float32(const LinearWeights& w) {
  return pack_panels<float>(w, [](float x) { return x; });
}

AlignedBuffer<char> pack_float16(const LinearWeights& w) {
  return pack_panels<scalar::Half>(w, narrowed<scalar::Half>);
}

AlignedBuffer<char> pack_bfloat16(const LinearWeights& w) {
  return pack_panels<scalar::BFloat, 2, bfloat16_pad>(w, narrowed<scalar::BFloat>);
}

bool fits_float16(const LinearWeights& w) {
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t i = 0; i < w.inputs; ++i) {
      const float x = std::fabs(w.weight[o * w.output_stride + i * w.input_stride]);
      if (x >= 65520.0f && !std::isinf(x)) return false;
    }
  return true;
}

AlignedBuffer<char> pack_int8(const LinearWeights& w, float* steps, float* sums) {
  const int64_t groups = round_up(w.inputs, int8_pad) / 4;
  AlignedBuffer<char> panels(round_up(w.outputs, panel_columns) * groups * 4);
  std::vector<float> row(w.inputs);
  for (int64_t o = 0; o < w.outputs; ++o) {
    const float largest = copy_row(w, o, row);
    if (std::isnan(largest)) {
      steps[o] = sums[o] = nan;
      continue;
    }
    const float step = largest > 0 ? largest / 127.0f : 1.0f;
    char* column = panels.data() + (o / panel_columns * groups * panel_columns + o % panel_columns) * 4;
    int64_t sum = 0;
    for (int64_t i = 0; i < w.inputs; ++i) {
      const int q = std::clamp(static_cast<int>(std::lrint(row[i] / step)), -127, 127);
      column[i / 4 * panel_columns * 4 + i % 4] = static_cast<char>(q);
      sum += q;
    }
    steps[o] = step;
    sums[o] = static_cast<float>(sum);
  }
  return panels;
}

AlignedBuffer<char> pack_tables(const LinearWeights& w, float magnitude, float* scale, float* bias) {
  const int64_t groups = (w.inputs + 3) / 4, line = lut_columns;
  AlignedBuffer<char> tables(round_up(w.outputs, line) * groups * 16);
  std::vector<float> row(w.inputs), sums(groups * 16);
  for (int64_t o = 0; o < w.outputs; ++o) {
    if (std::isnan(copy_row(w, o, row))) {
      scale[o] = bias[o] = nan;
      continue;
    }
    float largest = 0.0f;
    for (int64_t g = 0; g < groups; ++g)
      for (int code = 0; code < 16; ++code) {
        float sum = 0.0f;
        for (int64_t b = 0; b < 4 && 4 * g + b < w.inputs; ++b)
          sum += (code >> b & 1) ? row[4 * g + b] : -row[4 * g + b];
        sums[16 * g + code] = sum;
        largest = std::max(largest, sum);  // the negative of every sum occurs too
      }
    const float step = largest > 0 ? 2.0f * largest / 255.0f : 1.0f;
    // lut.h says which byte of a line is which column.
    const int64_t c = o % line, byte = c < line / 2 ? 2 * c : 2 * (c - line / 2) + 1;
    char* column = tables.data() + o / line * groups * 16 * line + byte;
    for (int64_t i = 0; i < groups * 16; ++i)
      column[i * line] =
          static_cast<char>(std::clamp(static_cast<int>(std::lrint((sums[i] + largest) / step)), 0, 255));
    scale[o] = step * magnitude;
    bias[o] -= largest * magnitude * static_cast<float>(groups);
  }
  return tables;
}

}  // namespace mprec
