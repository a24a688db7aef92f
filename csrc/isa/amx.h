// AVX-512 with VNNI and BF16, and AMX: registers of 16 rows of 64 bytes, and products of two of them.
//
// Tile registers have numbers, not types: a program says how many rows of how many bytes each has, and the
// compiler knows nothing of them. No intrinsics: gcc 12's do not say that they read memory. Linux lends the
// registers on request (common/cpu.cpp asks).
#pragma once
#define MPREC_ISA amx
#include "isa/avx512_base.h"
#include "isa/vnni.h"
// This header defines bfloat16's product of pairs, and tiles.
#define MPREC_DOT2
#define MPREC_TILES

namespace mprec::MPREC_ISA {

inline Vec dot2(Vec sum, Vec a, Vec b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
  return sum;
}

constexpr int tile_height = 16, tile_bytes = 64;

// Eight registers of whole height and width while it lives.
class WholeTiles {
 public:
  WholeTiles() {
    alignas(64) Configuration c{};
    c.palette = 1;
    for (int i = 0; i < 8; ++i) {
      c.row_bytes[i] = tile_bytes;
      c.rows[i] = tile_height;
    }
    asm volatile("ldtilecfg %0" : : "m"(c));
  }
  ~WholeTiles() { asm volatile("tilerelease"); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// Rows `stride` bytes apart.
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
}
// sum += a b, of bytes in fours, unsigned times signed; of bfloat16 numbers in pairs.
template <int sum, int a, int b>
inline void multiply_tiles(const uint8_t*) {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}
template <int sum, int a, int b>
inline void multiply_tiles(const uint16_t*) {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

}  // namespace mprec::MPREC_ISA
