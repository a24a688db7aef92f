// exp, log, cosine and the decoder's activations, to about one unit in the last place of a float.
// The polynomials for exp and log are Cephes' (expf, logf).
#pragma once
#include "dhe/dhe.h"
#include "isa/isa.h"

namespace mprec::MPREC_ISA {

template <int n>
inline Vec polynomial(Vec x, const float (&coefficients)[n]) {  // highest power first
  Vec y = broadcast(coefficients[0]);
  for (int i = 1; i < n; ++i) y = fma(y, x, broadcast(coefficients[i]));
  return y;
}

// NaN stays NaN; 0 below -87.7, infinity above 88.4.
inline Vec exp(Vec x) {
  x = lesser(broadcast(89.0f), greater(broadcast(-88.0f), x));  // in this order NaN passes
  const Int n = round_to_int(x * broadcast(1.44269504f));
  const Vec nf = to_float(n);
  Vec r = fma(nf, broadcast(-0.693359375f), x);
  r = fma(nf, broadcast(2.12194440e-4f), r);
  constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Vec y = fma(polynomial(r, c), r * r, r + broadcast(1.0f));
  return y * from_bits((n + broadcast_int(127)) << 23);  // n = -127 gives 0, n = 128 infinity
}

// Of positive normal numbers; NaN for x < 0.
inline Vec log(Vec x) {
  const Int half_root = broadcast_int(0x3f3504f3);  // 1 / sqrt(2)
  const Int e = shift_right_signed(bits(x) - half_root, 23);
  const Vec f = from_bits(bits(x) - (e << 23)) - broadcast(1.0f), ef = to_float(e), z = f * f;
  constexpr float c[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                         -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                         2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  Vec y = polynomial(f, c) * f * z;
  y = fma(ef, broadcast(-2.12194440e-4f), y);
  y = fma(broadcast(-0.5f), z, y);
  return fma(ef, broadcast(0.693359375f), f + y);
}

// cos(2 pi t), |t| < 2^22.
inline Vec cos_turns(Vec t) {
  t = t - to_float(round_to_int(t));                      // [-1/2, 1/2]
  t = lesser(t, broadcast(0.0f) - t) + broadcast(0.25f);  // sin(2 pi t) with t in [-1/4, 1/4] is left
  constexpr float c[] = {-15.0946426f, 42.0586939f, -76.7058597f, 81.6052493f, -41.3417022f, 6.28318531f};
  return polynomial(t * t, c) * t;
}

inline Vec sigmoid(Vec x) {
  const Vec one = broadcast(1.0f);
  return one / (one + exp(zero() - x));
}

// x tanh(ln(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2); from x = 20 on the ratio is 1.
inline Vec mish(Vec x) {
  const Vec two = broadcast(2.0f), e = exp(lesser(broadcast(20.0f), x)), n = e * (e + two);
  return x * (n / (n + two));
}

template <Vec (*f)(Vec)>
inline void map(float* p, int count) {
  for (int i = 0; i < count; i += Vec::width) store(p + i, f(load(p + i)));
}

inline Vec relu(Vec x) { return greater(zero(), x); }  // NaN passes

// In place, whole vectors: up to 15 floats past `count`.
inline void activate(Activation activation, float* p, int count) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return map<relu>(p, count);
    case Activation::sigmoid: return map<sigmoid>(p, count);
    case Activation::mish: return map<mish>(p, count);
  }
}

// A layer's activation over its blocks.
inline void activate_layer(const LayerView& layer, int rows, float* blocks, int64_t block_stride) {
  for (int column = 0; column < layer.outputs; column += block_columns) {
    const int count = layer.outputs - column < block_columns ? layer.outputs - column : block_columns;
    for (int r = 0; r < rows; ++r)
      activate(layer.activation, blocks + column / block_columns * block_stride + r * block_pitch, count);
  }
}

}  // namespace mprec::MPREC_ISA
