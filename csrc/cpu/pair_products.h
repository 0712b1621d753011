// The products of pairs.h by vectors of pairs. tile_products.h has the same functions by tiles.
#pragma once
#include "pairs.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t RANK_MULTIPLE = GROUP;  // that sums of outer products are padded to
inline int64_t padded_pairs(int64_t length) { return (length + 1) / 2; }

// For a call: what multiply_panel and outer_tiles need before (for rows of so many pairs) and after.
inline void begin_products(int64_t) {}
inline void end_products() {}

// out[t][n] = Σ_k rows[t][k] · panel[k][n] for Tokens rows and the LANES columns of a panel.
template <int Terms, int Tokens>
inline void multiply_tokens(const uint16_t* rows, int64_t row_stride, const uint32_t* panel, int64_t pairs, float* out,
                            int64_t stride) {
  constexpr int SUMS = Terms > 1 ? 2 : 1;  // of the first term and of the others
  Vec sums[Tokens][SUMS];
#pragma GCC unroll 16
  for (int i = 0; i < Tokens; ++i)
#pragma GCC unroll 2
    for (int s = 0; s < SUMS; ++s) sums[i][s] = zero();
  for (int64_t k = 0; k < pairs; ++k) {
    Pairs w[Terms];
#pragma GCC unroll 3
    for (int j = 0; j < Terms; ++j) w[j] = load_pairs(panel + (k * Terms + j) * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < Tokens; ++i) {
      const Pairs x = broadcast_pair(rows + i * row_stride + 2 * k);
#pragma GCC unroll 3
      for (int j = 0; j < Terms; ++j) sums[i][j > 0] = dot_pairs(sums[i][j > 0], x, w[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Tokens; ++i)
    store(out + i * stride, SUMS == 1 ? sums[i][0] : add_finite(sums[i][0], sums[i][SUMS - 1]));
}

template <int Terms>
inline void multiply_panel_of(const Rows& x, const uint32_t* panel, int64_t pairs, float* out, int64_t stride) {
  constexpr int TOGETHER = Terms == 1 ? 16 : 8;
  for (int64_t t = 0; t < TOKENS; t += TOGETHER)
    multiply_tokens<Terms, TOGETHER>(x.data + t * x.stride, x.stride, panel, pairs, out + t * stride, stride);
}

// packed[term][t / 2][q] = the terms of (ranks[t][q], ranks[t + 1][q]); ranks (TOKENS, padded_r).
template <int Terms>
inline void pack_ranks_of(const float* ranks, int64_t padded_r, uint32_t* packed) {
  for (int64_t t = 0; t < TOKENS; t += 2, ranks += 2 * padded_r)
    for (int64_t q = 0; q < padded_r; q += LANES, packed += LANES)
      store_terms<Terms>(load(ranks + q), load(ranks + padded_r + q), packed, BLOCK_PAIRS * padded_r);
}

// sums[q][v] += Σ_t ranks[t][q] · panel[t][v] for GROUP ranks and Width vectors of features.
template <int Width>
inline void add_outer(const uint32_t* ranks, int64_t padded_r, const uint32_t* panel, Vec (&sums)[GROUP][Width]) {
  for (int64_t t = 0; t < BLOCK_PAIRS; ++t) {
    Pairs row[Width];
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) row[v] = load_pairs(panel + (t * Width + v) * LANES);
#pragma GCC unroll 4
    for (int q = 0; q < GROUP; ++q) {
      const Pairs c = broadcast_pair(ranks + t * padded_r + q);
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) sums[q][v] = dot_pairs(sums[q][v], c, row[v]);
    }
  }
}

// The same into memory; First: for the first term, else for the others.
template <int Width, bool First>
inline void outer_terms(const uint32_t* ranks, int64_t padded_r, int terms, const uint32_t* panel, float* sums,
                        int64_t stride) {
  Vec acc[GROUP][Width];
#pragma GCC unroll 4
  for (int q = 0; q < GROUP; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) acc[q][v] = First ? load(sums + q * stride + v * LANES) : zero();
  for (int j = First ? 0 : 1; j < (First ? 1 : terms); ++j)
    add_outer(ranks + j * BLOCK_PAIRS * padded_r, padded_r, panel, acc);
#pragma GCC unroll 4
  for (int q = 0; q < GROUP; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) {
      float* to = sums + q * stride + v * LANES;
      store(to, First ? acc[q][v] : add_finite(load(to), acc[q][v]));
    }
}

// sums (r rounded up to RANK_MULTIPLE, stride) += Σ_t ranks[t] · panel[t] for Width · LANES features.
template <int Width>
inline void outer_tiles(const uint32_t* ranks, int64_t r, int64_t padded_r, int terms, const uint32_t* panel,
                        float* sums, int64_t stride) {
  for (int64_t q = 0; q < r; q += GROUP) {
    outer_terms<Width, true>(ranks + q, padded_r, terms, panel, sums + q * stride, stride);
    if (terms > 1) outer_terms<Width, false>(ranks + q, padded_r, terms, panel, sums + q * stride, stride);
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
