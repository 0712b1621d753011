// csrc/cpu/isa/amx.h in plain C++: the state of a thread's tiles, TDPBF16PS's own order of summing (Intel's manual),
// and abort() where the processor would fault. After emulated_pairs.h.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "cpu/isa/amx_tile_config.h"

namespace rosa {
namespace ROSA_ISA {

struct Tiles {
  TileConfig config;
  bool configured = false;
  uint32_t data[8][16][16];
};
inline Tiles& tiles() {
  static thread_local Tiles state;
  return state;
}
inline void require(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline void tile_configure(const TileConfig& config) {
  require(config.palette == 1 && config.start_row == 0, "palette 1 from row 0");
  for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes are zero");
  for (int tile = 0; tile < 16; ++tile) {
    require(config.rows[tile] <= 16, "at most 16 rows");
    require(config.row_bytes[tile] <= 64 && config.row_bytes[tile] % 4 == 0,
            "rows of at most 64 bytes, a multiple of 4");
    require((config.rows[tile] == 0) == (config.row_bytes[tile] == 0), "rows and bytes, or neither");
    require(tile < 8 || config.rows[tile] == 0, "eight tiles");
  }
  tiles().config = config;
  tiles().configured = true;
  std::memset(tiles().data, 0, sizeof tiles().data);
}
inline void tile_release() { tiles().configured = false; }

template <int Tile>
inline Tiles& valid() {
  static_assert(0 <= Tile && Tile < 8, "eight tiles");
  require(tiles().configured && tiles().config.rows[Tile] > 0, "a configured tile");
  return tiles();
}

template <int Tile>
inline void tile_zero() {
  Tiles& s = valid<Tile>();
  std::memset(s.data[Tile], 0, sizeof s.data[Tile]);
}
template <int Tile>
inline void tile_load(const void* rows, int64_t stride) {
  Tiles& s = valid<Tile>();
  std::memset(s.data[Tile], 0, sizeof s.data[Tile]);
  for (int i = 0; i < s.config.rows[Tile]; ++i)
    std::memcpy(s.data[Tile][i], (const char*)rows + i * stride, s.config.row_bytes[Tile]);
}
template <int Tile>
inline void tile_store(void* rows, int64_t stride) {
  Tiles& s = valid<Tile>();
  for (int i = 0; i < s.config.rows[Tile]; ++i)
    std::memcpy((char*)rows + i * stride, s.data[Tile][i], s.config.row_bytes[Tile]);
}

template <int Sum, int A, int B>
inline void tile_multiply() {
  static_assert(Sum != A && Sum != B && A != B, "three tiles");
  valid<Sum>(), valid<A>();
  Tiles& s = valid<B>();
  const TileConfig& c = s.config;
  require(c.rows[Sum] == c.rows[A] && c.row_bytes[Sum] == c.row_bytes[B] && c.row_bytes[A] == 4 * c.rows[B],
          "shapes that multiply");
  for (int m = 0; m < c.rows[Sum]; ++m)
    for (int n = 0; n < c.row_bytes[Sum] / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < c.rows[B]; ++k) {
        even = flushed_fma(low_half(s.data[A][m][k]), low_half(s.data[B][k][n]), even);
        odd = flushed_fma(high_half(s.data[A][m][k]), high_half(s.data[B][k][n]), odd);
      }
      s.data[Sum][m][n] = bits_of(flushed(flushed(float_of(s.data[Sum][m][n])) + flushed(even + odd)));
    }
}

}  // namespace ROSA_ISA
}  // namespace rosa
