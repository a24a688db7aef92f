// SVE with registers of 256 bits, and its products of bfloat16 numbers: 32 registers, masks in predicates.
//
// The compiler knows their length (list.cmake): only then can a register be a member of a struct, and the
// accumulators of a tile an array. Operators on such registers are the compiler's own. Intrinsics do the
// rest, most of them with a predicate: that of all lanes, where no mask is asked for.
#pragma once
#define MPREC_ISA sve256
#include <arm_sve.h>

#include <cstdint>

#include "arch/arch.h"
#include "isa/float16.h"

#if !defined(__ARM_FEATURE_SVE_BITS) || __ARM_FEATURE_SVE_BITS != 256
#error "for -msve-vector-bits=256 alone"
#endif

namespace mprec::MPREC_ISA {

#define MPREC_REGISTER __attribute__((arm_sve_vector_bits(256)))
typedef svfloat32_t FloatRegister MPREC_REGISTER;
typedef svint32_t SignedRegister MPREC_REGISTER;
typedef svuint32_t IntRegister MPREC_REGISTER;
typedef svbool_t Predicate MPREC_REGISTER;
#undef MPREC_REGISTER

inline Predicate lanes() { return svptrue_b32(); }

struct Vec {
  static constexpr int width = 8;
  static constexpr bool free_masks = true;
  FloatRegister v;
};
struct Mask {
  Predicate m;
  explicit Mask(int64_t n) : m(svwhilelt_b32_s64(0, n)) {}
};

inline Vec zero() { return {svdup_n_f32(0.0f)}; }
inline Vec broadcast(float x) { return {svdup_n_f32(x)}; }
inline Vec load(const float* p) { return {svld1_f32(lanes(), p)}; }
inline Vec load(const float* p, Mask k) { return {svld1_f32(k.m, p)}; }
inline void store(float* p, Vec a) { svst1_f32(lanes(), p, a.v); }
inline void store(float* p, Vec a, Mask k) { svst1_f32(k.m, p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec sqrt(Vec a) { return {svsqrt_f32_x(lanes(), a.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {svmla_f32_x(lanes(), c.v, a.v, b.v)}; }
// The instructions for minimum and maximum prefer a NaN, wherever it stands, or the other number.
inline Vec greater(Vec a, Vec b) { return {svsel_f32(svcmpgt_f32(lanes(), a.v, b.v), a.v, b.v)}; }
inline Vec lesser(Vec a, Vec b) { return {svsel_f32(svcmplt_f32(lanes(), a.v, b.v), a.v, b.v)}; }
inline float sum(Vec a) { return svaddv_f32(lanes(), a.v); }

// ---- float16 and bfloat16. Loads and stores widen and narrow integers: 16 bits are the low half of a lane

inline Vec widen(svuint32_t bits, Half) { return {svcvt_f32_f16_x(lanes(), svreinterpret_f16_u32(bits))}; }
inline Vec widen(svuint32_t bits, BFloat) {
  return {svreinterpret_f32_u32(svlsl_n_u32_x(lanes(), bits, 16))};
}
inline svuint32_t narrow(Vec a, Half) { return svreinterpret_u32_f16(svcvt_f16_f32_x(lanes(), a.v)); }
inline svuint32_t narrow(Vec a, BFloat) { return svreinterpret_u32_bf16(svcvt_bf16_f32_x(lanes(), a.v)); }
template <class T>
Vec load16(const T* p) {
  return widen(svld1uh_u32(lanes(), &p->bits), T{});
}
template <class T>
Vec load16(const T* p, Mask k) {
  return widen(svld1uh_u32(k.m, &p->bits), T{});
}
template <class T>
void store16(T* p, Vec a) {
  svst1h_u32(lanes(), &p->bits, narrow(a, T{}));
}
template <class T>
void store16(T* p, Vec a, Mask k) {
  svst1h_u32(k.m, &p->bits, narrow(a, T{}));
}
inline void to_floats(const Half (&pair)[2], float& first, float& second) {
  __fp16 both[2];
  __builtin_memcpy(both, pair, sizeof both);
  first = both[0];
  second = both[1];
}

// ---- Integers

struct Int {
  IntRegister v;
};
// Low and high words in a register each: SVE multiplies 32 bits to either half of a product.
struct Wide {
  Int low, high;
};

inline SignedRegister as_signed(Int a) { return svreinterpret_s32_u32(a.v); }
inline Int as_int(svint32_t a) { return {svreinterpret_u32_s32(a)}; }

inline Int broadcast_int(uint32_t x) { return {svdup_n_u32(x)}; }
inline Int load(const uint32_t* p) { return {svld1_u32(lanes(), p)}; }
// In the order of the hashes (slots.h): nothing here changes that of lanes.
inline Int load_slots(const uint32_t* row, int k) {
  static constexpr uint32_t slots[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  return {svtbl_u32(load(row + k).v, load(slots).v)};
}
inline void store(int32_t* p, Int a) { svst1_s32(lanes(), p, as_signed(a)); }
inline Int operator+(Int a, Int b) { return {a.v + b.v}; }
inline Int operator-(Int a, Int b) { return {a.v - b.v}; }
inline Int operator*(Int a, Int b) { return {a.v * b.v}; }
inline Int operator&(Int a, Int b) { return {a.v & b.v}; }
inline Int operator^(Int a, Int b) { return {a.v ^ b.v}; }
inline Int operator<<(Int a, int n) { return {a.v << static_cast<uint32_t>(n)}; }
inline Int operator>>(Int a, int n) { return {a.v >> static_cast<uint32_t>(n)}; }
inline Int shift_right_signed(Int a, int n) { return as_int(as_signed(a) >> n); }
inline Int lesser_unsigned(Int a, Int b) { return {svmin_u32_x(lanes(), a.v, b.v)}; }
inline Int round_to_int(Vec a) { return as_int(svcvt_s32_f32_x(lanes(), svrintn_f32_x(lanes(), a.v))); }
inline Vec to_float(Int a) { return {svcvt_f32_s32_x(lanes(), as_signed(a))}; }
inline Int bits(Vec a) { return {svreinterpret_u32_f32(a.v)}; }
inline Vec from_bits(Int a) { return {svreinterpret_f32_u32(a.v)}; }

inline Wide widen(Int a) { return {a, broadcast_int(0)}; }
inline Wide factors(Int a) { return widen(a); }
inline Wide operator*(Wide a, Int x) { return {a.low * x, {svmulh_u32_x(lanes(), a.low.v, x.v)}}; }
inline Wide operator+(Wide a, Wide b) {
  const Int low = a.low + b.low, high = a.high + b.high;
  const svbool_t carry = svcmplt_u32(lanes(), low.v, a.low.v);
  return {low, {svadd_n_u32_m(carry, high.v, 1)}};
}
inline Int low(Wide a) { return a.low; }
inline Int high(Wide a) { return a.high; }
inline Vec pair_first(Vec a) { return {svtrn1_f32(a.v, a.v)}; }   // lanes 0 0 2 2 ...
inline Vec pair_second(Vec a) { return {svtrn2_f32(a.v, a.v)}; }  // lanes 1 1 3 3 ...

// ---- Quantised rows

struct Pair {
  Vec even, odd;
};
inline void split_columns(Vec& a, Vec& b) {
  const Vec even{svuzp1_f32(a.v, b.v)};
  b.v = svuzp2_f32(a.v, b.v);
  a = even;
}
inline void join_columns(Vec& even, Vec& odd) {
  const Vec low{svzip1_f32(even.v, odd.v)};
  odd.v = svzip2_f32(even.v, odd.v);
  even = low;
}
inline Int load_bytes(const uint8_t* p) { return {svld1ub_u32(lanes(), p)}; }
inline Int load_bytes(const uint8_t* p, Mask k) { return {svld1ub_u32(k.m, p)}; }
inline Int load_bytes_past(const uint8_t* p, Mask k) { return load_bytes(p, k); }
inline Vec load_nibbles(const uint8_t* row, int64_t column) {
  const Int four = load_bytes(row + column / 2, Mask(4));
  return to_float(Int{svzip1_u32((four & broadcast_int(15)).v, (four >> 4).v)});
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

inline Vec load_half(const uint16_t* p) { return widen(svld1uh_u32(lanes(), p), Half{}); }
// No intrinsics for what a tile does with its accumulators: they would let the compiler move those about.
inline Vec accumulate(Vec a, Vec b, Vec sum) {
  asm("fmla %0.s, %1/m, %2.s, %3.s" : "+w"(sum.v) : "Upl"(lanes()), "w"(a.v), "w"(b.v));
  return sum;
}
// Levels are below 128, so that they are signed bytes too.
inline Int dot4(Int sum, Int levels, Int weights) {
  asm("sdot %0.s, %1.b, %2.b" : "+w"(sum.v) : "w"(levels.v), "w"(weights.v));
  return sum;
}
// sum + the two products of bfloat16 numbers of each lane. The macro says that there is such an instruction.
#define MPREC_DOT2
inline Vec dot2(Vec sum, Vec a, Vec b) {
  asm("bfdot %0.s, %1.h, %2.h" : "+w"(sum.v) : "w"(a.v), "w"(b.v));
  return sum;
}
inline void store_bytes(uint8_t* p, Int a) { svst1b_u32(lanes(), p, a.v); }
// The signs of four hashes, as 16-bit numbers of 0 or 1, times 64, 128, 256 and 512 in one product.
inline void store_sign_codes(uint16_t* codes, int j, Int h) {
  const svuint16_t signs = svreinterpret_u16_u32((h >> 30).v);
  const svuint64_t two =
      svdot_u64(svdup_n_u64(0), svuzp1_u16(signs, signs), svdupq_n_u16(64, 128, 256, 512, 64, 128, 256, 512));
  svst1h_u64(svptrue_pat_b64(SV_VL2), codes + j / 4, two);
}

constexpr int group_rows = 4, group_vectors = 4;
// A round of zips takes the highest bit of each number's row to the end of its column's bits, and the highest
// of its column to the end of its row's: after three, rows are columns.
inline void transpose_tile(const float* rows, int64_t stride, int count, int columns, float* out,
                           int64_t pitch) {
  const Mask mask(columns);
  Vec r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = i < count ? load(rows + i * stride, mask) : zero();
  const auto zip = [](const Vec(&from)[8], Vec(&to)[8]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      to[2 * i].v = svzip1_f32(from[i].v, from[i + 4].v);
      to[2 * i + 1].v = svzip2_f32(from[i].v, from[i + 4].v);
    }
  };
  zip(r, t);
  zip(t, r);
  zip(r, t);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    if (j < columns) store(out + j * pitch, t[j]);
}

inline void prefetch_to_write(const void* p) { asm volatile("prfm pstl1keep, %a0" : : "p"(p)); }

}  // namespace mprec::MPREC_ISA
