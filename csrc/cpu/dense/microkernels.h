// The dense products of the low-rank path, over one block of tokens.
#pragma once
#include "cpu/dense/pack.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int GROUP = 4;  // rows that share each load of their inputs

// packed[g][l][j] = matrix[4 g + j][l], zero past the last row: four rows' coefficients lie side by side.
inline void pack_groups(const float* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length,
                        float* packed) {
  for (int64_t g = 0; g < rows; g += GROUP) {
    const float* group = matrix + g * row_stride;
    if (g + GROUP <= rows)
      for (int64_t l = 0; l < length; ++l)
        for (int64_t j = 0; j < GROUP; ++j) *packed++ = group[j * row_stride + l * column_stride];
    else
      for (int64_t l = 0; l < length; ++l)
        for (int64_t j = 0; j < GROUP; ++j) *packed++ = g + j < rows ? group[j * row_stride + l * column_stride] : 0.0f;
  }
}

// out[j][t] = alpha · (out[j][t] + Σ_l coefficients[l][j] · in[l][t]) for one group, out taken as zero at First; with
// bits, in is masked by dropout before.
template <bool First, bool Masked>
inline void multiply_group(const float* coefficients, const float* in, const uint64_t* keep_bits, int64_t length,
                           float alpha, float* out, int64_t used) {
  const Vec scale = broadcast(alpha);
  for (int64_t t = 0; t < used; t += STRIP * LANES) {
    Vec sums[GROUP][STRIP];
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) sums[j][v] = First ? zero() : load(out + j * TOKENS + t + v * LANES);
    for (int64_t l = 0; l < length; ++l) {
      Vec inputs[STRIP];
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) {
        inputs[v] = load(in + l * TOKENS + t + v * LANES);
        if (Masked) inputs[v] = keep(keep_bits[l] >> (t + v * LANES), inputs[v]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < GROUP; ++j) {
        const Vec c = broadcast(coefficients[l * GROUP + j]);
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) sums[j][v] = fma(c, inputs[v], sums[j][v]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) store(out + j * TOKENS + t + v * LANES, mul(scale, sums[j][v]));
  }
}

template <bool First>
inline void multiply_panel(const float* packed, const float* in, const uint64_t* keep_bits, int64_t rows,
                           int64_t length, int64_t begin, int64_t width, float alpha, float* out, int64_t used) {
  for (int64_t g = 0; g < rows; g += GROUP) {
    const float *coefficients = packed + g * length + begin * GROUP, *inputs = in + begin * TOKENS;
    if (keep_bits)
      multiply_group<First, true>(coefficients, inputs, keep_bits + begin, width, alpha, out + g * TOKENS, used);
    else
      multiply_group<First, false>(coefficients, inputs, nullptr, width, alpha, out + g * TOKENS, used);
  }
}

constexpr int64_t LONG_PANEL = 4 * PANEL;  // features of a block that stay in the second-level cache (64 KiB)

// out (rows rounded up to GROUP, TOKENS) = alpha · matrix · in, the matrix packed by pack_groups; the first `used`
// columns. All groups pass over a panel of `in` before the next one is fetched.
inline void multiply(const float* packed, const float* in, const uint64_t* keep_bits, int64_t rows, int64_t length,
                     float alpha, float* out, int64_t used = TOKENS) {
  const int64_t width = smaller(LONG_PANEL, length);
  multiply_panel<true>(packed, in, keep_bits, rows, length, 0, width, width < length ? 1.0f : alpha, out, used);
  for (int64_t l = width; l < length; l += LONG_PANEL) {
    const int64_t next = smaller(LONG_PANEL, length - l);
    multiply_panel<false>(packed, in, keep_bits, rows, length, l, next, l + next < length ? 1.0f : alpha, out, used);
  }
}

// sums[q][f] += Σ_t ranks[t][q] · panel[t][f] for so many Ranks and Width vectors of features.
template <int Ranks, int Width>
inline void outer_tile(const float* ranks, int64_t rank_stride, const float* panel, int64_t panel_stride,
                       int64_t tokens, float* sums, int64_t sums_stride) {
  Vec acc[Ranks][Width];
#pragma GCC unroll 16
  for (int q = 0; q < Ranks; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) acc[q][v] = load(sums + q * sums_stride + v * LANES);
  for (int64_t t = 0; t < tokens; ++t) {
    Vec row[Width];
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) row[v] = load(panel + t * panel_stride + v * LANES);
#pragma GCC unroll 16
    for (int q = 0; q < Ranks; ++q) {
      const Vec c = broadcast(ranks[t * rank_stride + q]);
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) acc[q][v] = fma(c, row[v], acc[q][v]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Ranks; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) store(sums + q * sums_stride + v * LANES, acc[q][v]);
}

// sums (r, width) += ranksᵀ · panel for r, a multiple of Narrow, and width, a multiple of LANES; Narrow ranks at a time
// where one vector of features is left.
template <int Narrow>
inline void outer_panel(const float* ranks, int64_t rank_stride, int64_t r, const float* panel, int64_t panel_stride,
                        int64_t tokens, int64_t width, float* sums, int64_t sums_stride) {
  int64_t f = 0;
  for (; f + STRIP * LANES <= width; f += STRIP * LANES)
    for (int64_t q = 0; q < r; q += GROUP)
      outer_tile<GROUP, STRIP>(ranks + q, rank_stride, panel + f, panel_stride, tokens, sums + q * sums_stride + f,
                               sums_stride);
  for (; f < width; f += LANES)
    for (int64_t q = 0; q < r; q += Narrow)
      outer_tile<Narrow, 1>(ranks + q, rank_stride, panel + f, panel_stride, tokens, sums + q * sums_stride + f,
                            sums_stride);
}

// A block of tokens as the outer products read it: its rows as they lie in memory, or where dropout is on all TOKENS of
// it feature-major, with dropout's bits.
template <class T>
struct Block {
  const T* rows;
  int64_t stride, tokens;
  const float* packed = nullptr;
  const uint64_t* keep_bits = nullptr;
};

struct Panel {
  const float* data;  // (tokens, ...) token-major
  int64_t stride;
};

// `width` features of the block from `begin` on; fp32 rows serve where they lie, others through `copy`.
template <class T>
inline Panel panel_of(const Block<T>& block, int64_t begin, int64_t width, int64_t features, float* copy) {
  if (block.keep_bits) {
    unpack(block.packed + begin * TOKENS, block.keep_bits + begin, width, copy);
    return {copy, width};
  }
  if constexpr (sizeof(T) == sizeof(float))
    if (begin + width <= features) return {block.rows + begin, block.stride};
  copy_panel(block.rows + begin, block.stride, block.tokens, smaller(width, features - begin), copy, width);
  return {copy, width};
}

// sums (r rounded up to GROUP, features rounded up to LANES) += ranksᵀ · block, ranks (tokens, r rounded up)
// token-major.
template <class T>
inline void outer(const float* ranks, int64_t r, const Block<T>& block, int64_t features, float* sums) {
  const int64_t sums_stride = rounded_up(features, LANES), rank_stride = rounded_up(r, GROUP);
  alignas(64) float copy[TOKENS * PANEL];
  for (int64_t begin = 0; begin < sums_stride; begin += PANEL) {
    const int64_t width = smaller(PANEL, sums_stride - begin);
    const Panel panel = panel_of(block, begin, width, features, copy);
    outer_panel<GROUP>(ranks, rank_stride, rank_stride, panel.data, panel.stride, block.tokens, width, sums + begin,
                       sums_stride);
  }
}

// ranks (r, TOKENS) -> (TOKENS, r), both with r rounded up to GROUP.
inline void token_major(const float* ranks, int64_t r, float* out) {
  const int64_t stride = rounded_up(r, GROUP);
  for (int64_t q = 0; q < stride; ++q)
    for (int64_t t = 0; t < TOKENS; ++t) out[t * stride + q] = ranks[q * TOKENS + t];
}

}  // namespace ROSA_ISA
}  // namespace rosa
