// NEON (Advanced SIMD), which every aarch64 CPU has: 32 registers of 128 bits.
#pragma once
#define MPREC_ISA neon
#include <arm_neon.h>

#include <cstdint>

#include "arch/arch.h"
#include "isa/float16.h"

namespace mprec::MPREC_ISA {

struct Vec {
  static constexpr int width = 4;
  static constexpr bool free_masks = false;
  float32x4_t v;
};
struct Mask {
  int n;
  explicit Mask(int64_t n) : n(static_cast<int>(n)) {}
};

inline Vec zero() { return {vdupq_n_f32(0.0f)}; }
inline Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }

// There are no masked loads and stores. Most masks that occur are of whole registers.
template <class T>
struct FirstLanes {  // zeros behind them
  alignas(16) T lanes[4] = {};
  FirstLanes(const T* p, Mask k) {
    for (int i = 0; i < k.n; ++i) lanes[i] = p[i];
  }
};
template <class T>
inline void store_first(T* p, const T (&lanes)[4], Mask k) {
  for (int i = 0; i < k.n; ++i) p[i] = lanes[i];
}
inline Vec load(const float* p, Mask k) { return k.n == 4 ? load(p) : load(FirstLanes<float>(p, k).lanes); }
inline void store(float* p, Vec a, Mask k) {
  if (k.n == 4) return store(p, a);
  float lanes[4];
  store(lanes, a);
  store_first(p, lanes, k);
}

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// The instructions for minimum and maximum prefer a NaN, wherever it stands, or the other number.
inline Vec greater(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec lesser(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline float sum(Vec a) { return vaddvq_f32(a.v); }

// ---- float16 and bfloat16

inline float32x4_t widen(uint16x4_t bits, Half) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
inline float32x4_t widen(uint16x4_t bits, BFloat) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
inline uint16x4_t narrow(Vec a, Half) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
inline uint16x4_t narrow(Vec a, BFloat) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet), 16);  // NaN differs from itself
}
template <class T>
Vec load16(const T* p) {
  uint16x4_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return {widen(bits, T{})};
}
template <class T>
Vec load16(const T* p, Mask k) {
  return k.n == 4 ? load16(p) : load16(FirstLanes<T>(p, k).lanes);
}
template <class T>
void store16(T* p, Vec a) {
  const uint16x4_t bits = narrow(a, T{});
  __builtin_memcpy(p, &bits, sizeof bits);
}
template <class T>
void store16(T* p, Vec a, Mask k) {
  T lanes[4];
  store16(lanes, a);
  store_first(p, lanes, k);
}
inline void to_floats(const Half (&pair)[2], float& first, float& second) {
  const Half four[4] = {pair[0], pair[1], {}, {}};
  const Vec x = load16(four);
  first = vgetq_lane_f32(x.v, 0);
  second = vgetq_lane_f32(x.v, 1);
}

// ---- Integers

struct Int {
  uint32x4_t v;
};
// Of a register's lanes 0 and 2, and of 1 and 3: coefficients of hashes stand in the order 0 2 1 3 (slots.h),
// so these are the first two and the last two of four.
struct Wide {
  uint64x2_t even, odd;
};

inline Int broadcast_int(uint32_t x) { return {vdupq_n_u32(x)}; }
inline Int load(const uint32_t* p) { return {vld1q_u32(p)}; }
inline Int load_slots(const uint32_t* row, int k) { return load(row + k); }
inline void store(int32_t* p, Int a) { vst1q_s32(p, vreinterpretq_s32_u32(a.v)); }
inline Int operator+(Int a, Int b) { return {vaddq_u32(a.v, b.v)}; }
inline Int operator-(Int a, Int b) { return {vsubq_u32(a.v, b.v)}; }
inline Int operator*(Int a, Int b) { return {vmulq_u32(a.v, b.v)}; }
inline Int operator&(Int a, Int b) { return {vandq_u32(a.v, b.v)}; }
inline Int operator^(Int a, Int b) { return {veorq_u32(a.v, b.v)}; }
inline Int operator<<(Int a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(n))}; }
inline Int operator>>(Int a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(-n))}; }
inline Int shift_right_signed(Int a, int n) {
  return {vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(a.v), vdupq_n_s32(-n)))};
}
inline Int lesser_unsigned(Int a, Int b) { return {vminq_u32(a.v, b.v)}; }
inline Int round_to_int(Vec a) { return {vreinterpretq_u32_s32(vcvtnq_s32_f32(a.v))}; }
inline Vec to_float(Int a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }
inline Int bits(Vec a) { return {vreinterpretq_u32_f32(a.v)}; }
inline Vec from_bits(Int a) { return {vreinterpretq_f32_u32(a.v)}; }

inline Wide widen(Int a) {
  const uint64x2_t both = vreinterpretq_u64_u32(a.v);
  return {vandq_u64(both, vdupq_n_u64(0xffffffff)), vshrq_n_u64(both, 32)};
}
inline Wide factors(Int a) { return widen(a); }
inline Wide operator*(Wide a, Int x) {
  const uint32x2_t factor = vget_low_u32(x.v);  // all lanes are alike
  return {vmull_u32(vmovn_u64(a.even), factor), vmull_u32(vmovn_u64(a.odd), factor)};
}
inline Wide operator+(Wide a, Wide b) { return {vaddq_u64(a.even, b.even), vaddq_u64(a.odd, b.odd)}; }
inline Int low(Wide a) { return {vuzp1q_u32(vreinterpretq_u32_u64(a.even), vreinterpretq_u32_u64(a.odd))}; }
inline Int high(Wide a) { return {vuzp2q_u32(vreinterpretq_u32_u64(a.even), vreinterpretq_u32_u64(a.odd))}; }
inline Vec pair_first(Vec a) { return {vtrn1q_f32(a.v, a.v)}; }   // lanes 0 0 2 2
inline Vec pair_second(Vec a) { return {vtrn2q_f32(a.v, a.v)}; }  // lanes 1 1 3 3

// ---- Quantised rows

struct Pair {
  Vec even, odd;
};
inline void split_columns(Vec& a, Vec& b) {
  const Vec even{vuzp1q_f32(a.v, b.v)};
  b.v = vuzp2q_f32(a.v, b.v);
  a = even;
}
inline void join_columns(Vec& even, Vec& odd) {
  const Vec low{vzip1q_f32(even.v, odd.v)};
  odd.v = vzip2q_f32(even.v, odd.v);
  even = low;
}
inline uint8x8_t low_bytes(uint32_t bytes) { return vreinterpret_u8_u32(vdup_n_u32(bytes)); }
inline Int widen_bytes(uint8x8_t bytes) { return {vmovl_u16(vget_low_u16(vmovl_u8(bytes)))}; }
inline Int load_bytes(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return widen_bytes(low_bytes(four));
}
inline Int load_bytes(const uint8_t* p, Mask k) { return load_bytes(FirstLanes<uint8_t>(p, k).lanes); }
inline Int load_bytes_past(const uint8_t* p, Mask) { return load_bytes(p); }
inline Vec load_nibbles(const uint8_t* row, int64_t column) {
  uint16_t two;
  __builtin_memcpy(&two, row + column / 2, sizeof two);
  const uint8x8_t bytes = low_bytes(two);
  return to_float(widen_bytes(vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4))));
}
inline Vec load_nibbles_past(const uint8_t* row, int64_t column, Mask) { return load_nibbles(row, column); }
inline Pair load_nibble_pairs(const uint8_t* row, int64_t column) {
  const Int x = load_bytes(row + column / 2);
  return {to_float(x & broadcast_int(15)), to_float(x >> 4)};
}
inline Pair load_nibble_pairs_past(const uint8_t* row, int64_t column, Mask) {
  return load_nibble_pairs(row, column);
}

// ---- Matrix products

// 24 accumulators, and registers for 4 of weights and some of inputs: 10 loads for 24 FMAs.
constexpr int tile_rows = 6, tile_vectors = 4;

inline Vec load_half(const uint16_t* p) { return {widen(vld1_u16(p), Half{})}; }
inline Vec accumulate(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
// Levels are below 128, so that they are signed bytes too and sums of two products fit 16 bits.
inline Int dot4(Int sum, Int levels, Int weights) {
  const int8x16_t a = vreinterpretq_s8_u32(levels.v), b = vreinterpretq_s8_u32(weights.v);
  const int16x8_t first = vmull_s8(vget_low_s8(a), vget_low_s8(b)), second = vmull_high_s8(a, b);
  const int16x8_t pairs = vpaddq_s16(first, second);
  // No intrinsic: with that gcc 12 moves a tile's accumulators about, and spills some.
  asm("sadalp %0.4s, %1.8h" : "+w"(sum.v) : "w"(pairs));
  return sum;
}
inline void store_bytes(uint8_t* p, Int a) {
  const uint16x4_t words = vmovn_u32(a.v);
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
  vst1_lane_u32(reinterpret_cast<uint32_t*>(p), vreinterpret_u32_u8(bytes), 0);
}
inline uint32_t sign_bits(Int h) {
  static constexpr int32_t places[4] = {0, 1, 2, 3};
  return vaddvq_u32(vshlq_u32((h >> 30).v, vld1q_s32(places)));
}
inline void store_sign_codes(uint16_t* codes, int j, Int h) {
  codes[j / 4] = static_cast<uint16_t>(sign_bits(h) << 6);
}

constexpr int group_rows = 4, group_vectors = 4;
inline void transpose_tile(const float* rows, int64_t stride, int count, int columns, float* out,
                           int64_t pitch) {
  const Mask mask(columns);
  float32x4_t r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = i < count ? load(rows + i * stride, mask).v : zero().v;
  const auto words = [](float32x4_t low, float32x4_t high) {
    return float64x2x2_t{vtrn1q_f64(vreinterpretq_f64_f32(low), vreinterpretq_f64_f32(high)),
                         vtrn2q_f64(vreinterpretq_f64_f32(low), vreinterpretq_f64_f32(high))};
  };
  const float64x2x2_t even = words(vtrn1q_f32(r[0], r[1]), vtrn1q_f32(r[2], r[3])),
                      odd = words(vtrn2q_f32(r[0], r[1]), vtrn2q_f32(r[2], r[3]));
  const float64x2_t column[4] = {even.val[0], odd.val[0], even.val[1], odd.val[1]};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    if (j < columns) store(out + j * pitch, Vec{vreinterpretq_f32_f64(column[j])});
}

inline void prefetch_to_write(const void* p) { asm volatile("prfm pstl1keep, %a0" : : "p"(p)); }

}  // namespace mprec::MPREC_ISA
