// Between token-major matrices in memory and feature-major blocks of BLOCK_TOKENS tokens in cache.
#pragma once
#include "cpu/common/buffer.h"
#include "cpu/common/parallel.h"

namespace rosa {
namespace ROSA_ISA {

// Features of a block that stay in the first-level cache (16 KiB) while several loops pass over them.
constexpr int64_t PANEL = 64;

// The part of a block that holds any of its tokens, in whole strips; what lies beyond is neither computed nor read.
inline int64_t used_width(int64_t tokens) { return rounded_up(tokens, STRIP * LANES); }

// The first `count` of LANES numbers as fp32, zero beyond; and the first `count` of a vector stored.
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T padded[LANES] = {};
  copy_elements(padded, from, count);
  return load(padded);
}
template <class T>
inline void store_some(T* to, int64_t count, Vec a) {
  if (count >= LANES) return store(to, a);
  T padded[LANES];
  store(padded, a);
  copy_elements(to, padded, count);
}

// Calls write(i, column i) for the LANES columns of the square whose row i is read(i).
template <class Read, class Write>
ROSA_INLINE void transpose_square(const Read& read, const Write& write) {
  Vec square[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) square[i] = read(i);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) write(i, square[i]);
}

// packed[f][t] = rows[t][f], fp32. Features up to the next multiple of LANES become zero, and so do absent tokens, up
// to column `used`. Features go by panels, so that each visit to a row, which may lie in a page of its
// own, reads 4 cache lines of fp32.
template <class T>
inline void pack(const T* rows, int64_t stride, int64_t tokens, int64_t features, float* packed,
                 int64_t used = BLOCK_TOKENS) {
  const int64_t whole = features / LANES * LANES;
  for (int64_t panel = 0; panel < whole; panel += PANEL)
    for (int64_t t = 0; t < used; t += LANES)
      for (int64_t f = panel; f < smaller(panel + PANEL, whole); f += LANES)
        transpose_square([&](int i) { return t + i < tokens ? load(rows + (t + i) * stride + f) : zero(); },
                         [&](int i, Vec column) { store(packed + (f + i) * BLOCK_TOKENS + t, column); });
  if (whole == features) return;
  std::memset(packed + whole * BLOCK_TOKENS, 0, sizeof(float) * LANES * BLOCK_TOKENS);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t f = whole; f < features; ++f) packed[f * BLOCK_TOKENS + t] = as_float(rows[t * stride + f]);
}

// panel[t][f] = rows[t][f] as fp32, zero from `features` up to `width`, a multiple of LANES: rows far apart become one
// piece.
template <class T>
inline void copy_panel(const T* rows, int64_t stride, int64_t tokens, int64_t features, float* panel, int64_t width) {
  const int64_t whole = features / LANES * LANES;
  for (int64_t t = 0; t < tokens; ++t, rows += stride, panel += width) {
    for (int64_t f = 0; f < whole; f += LANES) store(panel + f, load(rows + f));
    for (int64_t f = whole; f < width; ++f) panel[f] = f < features ? as_float(rows[f]) : 0.0f;
  }
}

// panel[t][f] = packed[f][t] for `width` features, a multiple of LANES, where dropout keeps it, else zero.
inline void unpack(const float* packed, const uint64_t* keep_bits, int64_t width, float* panel) {
  for (int64_t f = 0; f < width; f += LANES)
    for (int64_t t = 0; t < BLOCK_TOKENS; t += LANES)
      transpose_square([&](int i) { return keep(keep_bits[f + i] >> t, load(packed + (f + i) * BLOCK_TOKENS + t)); },
                       [&](int i, Vec column) { store(panel + (t + i) * width + f, column); });
}

// to[i] += a[i] for the first `count` of LANES numbers. It is kept out of the loops that rarely need it.
template <class T>
__attribute__((noinline)) void add_to_some(T* to, int64_t count, Vec a) {
  store_some(to, count, add(load_some(to, count), a));
}

// rows[t][f] += tile[f][t]. The tile has whole squares of LANES; rows have so many tokens and features.
template <class T>
inline void add_transposed(const float* tile, int64_t tokens, int64_t features, T* rows, int64_t stride) {
  for (int64_t t = 0; t < tokens; t += LANES)
    for (int64_t f = 0; f < features; f += LANES) {
      const bool whole = features - f >= LANES;
      transpose_square([&](int i) { return load(tile + (f + i) * BLOCK_TOKENS + t); },
                       [&](int i, Vec column) {
                         if (t + i >= tokens) return;
                         T* const out = rows + (t + i) * stride + f;
                         whole ? store(out, add(load(out), column)) : add_to_some(out, features - f, column);
                       });
    }
}

}  // namespace ROSA_ISA
}  // namespace rosa
