// Between token-major matrices in memory and feature-major blocks of TOKENS tokens in cache.
#pragma once
#include "cpu/common/scratch.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t PANEL =
    64;  // features of a block that stay in the first-level cache (16 KiB) while several loops pass over them

// The part of a block that holds any of its tokens, in whole strips; what lies beyond is neither computed nor read.
inline int64_t used_width(int64_t tokens) { return rounded_up(tokens, STRIP * LANES); }

// packed[f][t] = rows[t][f], fp32; features from `features` up to the next multiple of LANES and absent tokens become
// zero, the latter as far as `used`. By panels of features, so that each visit to a row, which may lie in a page of its
// own, reads 4 cache lines of fp32.
template <class T>
inline void pack(const T* rows, int64_t stride, int64_t tokens, int64_t features, float* packed,
                 int64_t used = TOKENS) {
  const int64_t whole = features / LANES * LANES;
  for (int64_t panel = 0; panel < whole; panel += PANEL)
    for (int64_t t = 0; t < used; t += LANES)
      for (int64_t f = panel; f < smaller(panel + PANEL, whole); f += LANES) {
        Vec tile[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) tile[i] = t + i < tokens ? load(rows + (t + i) * stride + f) : zero();
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(packed + (f + i) * TOKENS + t, tile[i]);
      }
  if (whole == features) return;
  std::memset(packed + whole * TOKENS, 0, sizeof(float) * LANES * TOKENS);
  for (int64_t t = 0; t < tokens; ++t) {
    T padded[LANES] = {};
    float as_float[LANES];
    for (int64_t f = whole; f < features; ++f) padded[f - whole] = rows[t * stride + f];
    store(as_float, load(padded));
    for (int64_t f = whole; f < features; ++f) packed[f * TOKENS + t] = as_float[f - whole];
  }
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

// panel[t][f] = packed[f][t] for `width` features, a multiple of LANES: only what dropout keeps.
inline void unpack(const float* packed, const uint64_t* keep_bits, int64_t width, float* panel) {
  for (int64_t f = 0; f < width; f += LANES)
    for (int64_t t = 0; t < TOKENS; t += LANES) {
      Vec tile[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        tile[i] = load(packed + (f + i) * TOKENS + t);
        tile[i] = keep(keep_bits[f + i] >> t, tile[i]);
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(panel + (t + i) * width + f, tile[i]);
    }
}

// rows[t][f] += tile[f][t]; the last features through a padded copy.
template <class T>
inline void add_transposed(const float* tile, int64_t tokens, int64_t features, T* rows, int64_t stride) {
  for (int64_t t = 0; t < tokens; t += LANES)
    for (int64_t f = 0; f < features; f += LANES) {
      const int64_t count = smaller(LANES, features - f);
      Vec block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) block[i] = load(tile + (f + i) * TOKENS + t);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        if (t + i >= tokens) break;
        T* out = rows + (t + i) * stride + f;
        if (count == LANES) {
          store(out, add(load(out), block[i]));
        } else {
          T padded[LANES] = {};
          for (int64_t c = 0; c < count; ++c) padded[c] = out[c];
          store(padded, add(load(padded), block[i]));
          for (int64_t c = 0; c < count; ++c) out[c] = padded[c];
        }
      }
    }
}

}  // namespace ROSA_ISA
}  // namespace rosa
