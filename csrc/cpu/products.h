// The dense products of the low-rank path, over one block of tokens.
#pragma once
#include "tiles.h"

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
        for (int64_t j = 0; j < GROUP; ++j)
          *packed++ = g + j < rows ? group[j * row_stride + l * column_stride] : 0.0f;
  }
}

// out[j][t] = alpha · Σ_l coefficients[l][j] · in[l][t] for one group; with bits, in is masked by dropout first.
template <bool Masked>
inline void multiply_group(const float* coefficients, const float* in, const uint64_t* keep_bits, int64_t length,
                           float alpha, float* out, int64_t width) {
  for (int64_t t = 0; t < width; t += STRIP * LANES) {
    Vec sums[GROUP][STRIP];
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) sums[j][v] = zero();
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
    const Vec scale = broadcast(alpha);
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) store(out + j * TOKENS + t + v * LANES, mul(scale, sums[j][v]));
  }
}

// out (rows rounded up to GROUP, TOKENS) = alpha · matrix · in, the matrix packed by pack_groups; the first width columns.
inline void multiply(const float* packed, const float* in, const uint64_t* keep_bits, int64_t rows, int64_t length,
                     float alpha, float* out, int64_t width = TOKENS) {
  for (int64_t g = 0; g < rows; g += GROUP) {
    if (keep_bits)
      multiply_group<true>(packed + g * length, in, keep_bits, length, alpha, out + g * TOKENS, width);
    else
      multiply_group<false>(packed + g * length, in, nullptr, length, alpha, out + g * TOKENS, width);
  }
}

// sums[q][f] += Σ_t ranks[t][q] · panel[t][f] for GROUP ranks and Width vectors of features.
template <int Width>
inline void outer_tile(const float* ranks, int64_t rank_stride, const float* panel, int64_t panel_stride, float* sums,
                       int64_t sums_stride) {
  Vec acc[GROUP][Width];
#pragma GCC unroll 4
  for (int q = 0; q < GROUP; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) acc[q][v] = load(sums + q * sums_stride + v * LANES);
  for (int64_t t = 0; t < TOKENS; ++t) {
    Vec row[Width];
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) row[v] = load(panel + t * panel_stride + v * LANES);
#pragma GCC unroll 4
    for (int q = 0; q < GROUP; ++q) {
      const Vec c = broadcast(ranks[t * rank_stride + q]);
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) acc[q][v] = fma(c, row[v], acc[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < GROUP; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) store(sums + q * sums_stride + v * LANES, acc[q][v]);
}

// A block of tokens as the outer products read it: `rows` token-major fp32 where memory already holds that (else null),
// `packed` feature-major always.
struct Block {
  const float* rows;
  int64_t stride;
  const float* packed;
  const uint64_t* keep_bits;
};

template <int Width>
inline void outer_panel(const float* ranks, int64_t r, const Block& block, int64_t f, int64_t features, float* sums,
                        int64_t sums_stride) {
  alignas(64) float unpacked[TOKENS * Width * LANES];
  const bool direct = block.rows && f + Width * LANES <= features;
  const float* panel = direct ? block.rows + f : unpacked;
  const int64_t stride = direct ? block.stride : Width * LANES;
  if (!direct)
    unpack(block.packed + f * TOKENS, block.keep_bits ? block.keep_bits + f : nullptr, Width * LANES, unpacked);
  for (int64_t q = 0; q < r; q += GROUP)
    outer_tile<Width>(ranks + q, rounded_up(r, GROUP), panel, stride, sums + q * sums_stride + f, sums_stride);
}

// sums (r rounded up to GROUP, features rounded up to LANES) += ranksᵀ · block, ranks (TOKENS, r rounded up) token-major.
inline void outer(const float* ranks, int64_t r, const Block& block, int64_t features, float* sums) {
  const int64_t stride = rounded_up(features, LANES);
  int64_t f = 0;
  for (; f + STRIP * LANES <= stride; f += STRIP * LANES)
    outer_panel<STRIP>(ranks, r, block, f, features, sums, stride);
  for (; f < stride; f += LANES) outer_panel<1>(ranks, r, block, f, features, sums, stride);
}

// ranks (r, TOKENS) -> (TOKENS, r), both with r rounded up to GROUP.
inline void token_major(const float* ranks, int64_t r, float* out) {
  const int64_t stride = rounded_up(r, GROUP);
  for (int64_t q = 0; q < stride; ++q)
    for (int64_t t = 0; t < TOKENS; ++t) out[t * stride + q] = ranks[q * TOKENS + t];
}

}  // namespace ROSA_ISA
}  // namespace rosa
