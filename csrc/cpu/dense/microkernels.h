// The dense products of the low-rank path, over one block of tokens.
#pragma once
#include "cpu/dense/register_tile.h"

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
    RegisterTile<GROUP, STRIP> tile;
    First ? tile.clear() : tile.load_from(out + t, BLOCK_TOKENS);
    for (int64_t l = 0; l < length; ++l)
      tile.add_outer([&](int j) { return coefficients[l * GROUP + j]; },
                     [&](int v) {
                       const Vec inputs = load(in + l * BLOCK_TOKENS + t + v * LANES);
                       return Masked ? keep(keep_bits[l] >> (t + v * LANES), inputs) : inputs;
                     });
    tile.for_each([&](int j, int v) { tile.sums[j][v] = mul(scale, tile.sums[j][v]); });
    tile.store_to(out + t, BLOCK_TOKENS);
  }
}

template <bool First>
inline void multiply_panel(const float* packed, const float* in, const uint64_t* keep_bits, int64_t rows,
                           int64_t length, int64_t begin, int64_t width, float alpha, float* out, int64_t used) {
  for (int64_t g = 0; g < rows; g += GROUP) {
    const float *coefficients = packed + g * length + begin * GROUP, *inputs = in + begin * BLOCK_TOKENS;
    if (keep_bits)
      multiply_group<First, true>(coefficients, inputs, keep_bits + begin, width, alpha, out + g * BLOCK_TOKENS, used);
    else
      multiply_group<First, false>(coefficients, inputs, nullptr, width, alpha, out + g * BLOCK_TOKENS, used);
  }
}

constexpr int64_t LONG_PANEL = 4 * PANEL;  // features of a block that stay in the second-level cache (64 KiB)

// out (rows rounded up to GROUP, BLOCK_TOKENS) = alpha · matrix · in, the matrix packed by pack_groups; the first
// `used` columns. All groups pass over a panel of `in` before the next one is fetched.
inline void multiply(const float* packed, const float* in, const uint64_t* keep_bits, int64_t rows, int64_t length,
                     float alpha, float* out, int64_t used = BLOCK_TOKENS) {
  const int64_t width = smaller(LONG_PANEL, length);
  multiply_panel<true>(packed, in, keep_bits, rows, length, 0, width, width < length ? 1.0f : alpha, out, used);
  for (int64_t l = width; l < length; l += LONG_PANEL) {
    const int64_t next = smaller(LONG_PANEL, length - l);
    multiply_panel<false>(packed, in, keep_bits, rows, length, l, next, l + next < length ? 1.0f : alpha, out, used);
  }
}

// sums[q][f] += Σ_t H[t][q] · panel[t][f] for Ranks ranks and Width vectors of features; H stands for dH and gathered
// features too.
template <int Ranks, int Width>
inline void outer_tile(const float* H, int64_t rank_stride, const float* panel, int64_t panel_stride, int64_t tokens,
                       float* sums, int64_t sums_stride) {
  RegisterTile<Ranks, Width> tile;
  tile.load_from(sums, sums_stride);
  for (int64_t t = 0; t < tokens; ++t)
    tile.add_outer([&](int q) { return H[t * rank_stride + q]; },
                   [&](int v) { return load(panel + t * panel_stride + v * LANES); });
  tile.store_to(sums, sums_stride);
}

// sums (r, width) += Hᵀ · panel for r, a multiple of Narrow, and width, a multiple of LANES. Where one vector of
// features is left, Narrow ranks go at a time.
template <int Narrow>
inline void outer_panel(const float* H, int64_t rank_stride, int64_t r, const float* panel, int64_t panel_stride,
                        int64_t tokens, int64_t width, float* sums, int64_t sums_stride) {
  int64_t f = 0;
  for (; f + STRIP * LANES <= width; f += STRIP * LANES)
    for (int64_t q = 0; q < r; q += GROUP)
      outer_tile<GROUP, STRIP>(H + q, rank_stride, panel + f, panel_stride, tokens, sums + q * sums_stride + f,
                               sums_stride);
  for (; f < width; f += LANES)
    for (int64_t q = 0; q < r; q += Narrow)
      outer_tile<Narrow, 1>(H + q, rank_stride, panel + f, panel_stride, tokens, sums + q * sums_stride + f,
                            sums_stride);
}

// A block of tokens as the outer products read it: its rows as they lie in memory, or with dropout's bits the whole
// block feature-major.
template <class T>
struct TokenBlock {
  const T* rows;
  int64_t stride, tokens;
  const float* packed = nullptr;
  const uint64_t* keep_bits = nullptr;
};

struct Panel {
  const float* data;  // (tokens, ...) token-major
  int64_t stride;
};

// `width` features of the block from `begin` on; fp32 rows are used in place; others are first converted into `copy`.
template <class T>
inline Panel panel_of(const TokenBlock<T>& block, int64_t begin, int64_t width, int64_t features, float* copy) {
  if (block.keep_bits) {
    unpack(block.packed + begin * BLOCK_TOKENS, block.keep_bits + begin, width, copy);
    return {copy, width};
  }
  if constexpr (sizeof(T) == sizeof(float))
    if (begin + width <= features) return {block.rows + begin, block.stride};
  copy_panel(block.rows + begin, block.stride, block.tokens, smaller(width, features - begin), copy, width);
  return {copy, width};
}

// sums (r rounded up to GROUP, features rounded up to LANES) += Hᵀ · block, H (tokens, r rounded up)
// token-major.
template <class T>
inline void outer(const float* H, int64_t r, const TokenBlock<T>& block, int64_t features, float* sums) {
  const int64_t sums_stride = rounded_up(features, LANES), rank_stride = rounded_up(r, GROUP);
  alignas(64) float copy[BLOCK_TOKENS * PANEL];
  for (int64_t begin = 0; begin < sums_stride; begin += PANEL) {
    const int64_t width = smaller(PANEL, sums_stride - begin);
    const Panel panel = panel_of(block, begin, width, features, copy);
    outer_panel<GROUP>(H, rank_stride, rank_stride, panel.data, panel.stride, block.tokens, width, sums + begin,
                       sums_stride);
  }
}

// H (r, BLOCK_TOKENS) -> (BLOCK_TOKENS, r), both with r rounded up to GROUP.
inline void token_major(const float* H, int64_t r, float* out) {
  const int64_t stride = rounded_up(r, GROUP);
  for (int64_t q = 0; q < stride; ++q)
    for (int64_t t = 0; t < BLOCK_TOKENS; ++t) out[t * stride + q] = H[q * BLOCK_TOKENS + t];
}

}  // namespace ROSA_ISA
}  // namespace rosa
