// The products of bf16_vnni.h by tiles. bf16_dot_avx512.h has the same functions by vectors of pairs.
//
// Each number of an fp32 adapter is a sum of bfloat16 terms of 8 bits. Three terms hold its 24 bits exactly; A in
// H = x Aᵀ, B in dH = dy B, and H and dH in dB and dA have three. B and A have two in the products that end in
// bfloat16, which err by 2^-15. Numbers are exact down to 2^-126, because the instructions take denormals as zeros.
//
// All terms but the first are summed apart. Where x is infinite a term of 0 makes that sum NaN, and it is left out: the
// first term alone then gives the infinity that fp32 arithmetic gives.
#pragma once
#include "cpu/dense/bf16_vnni.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t TILE_PAIRS = 16;  // pairs of a tile's row, and rows of a tile
constexpr int64_t TILE_BYTES = 64;  // of a row
constexpr int LEFT = 6, RIGHT = 7;  // tiles of the operands; sums are in tiles 0 to 3

constexpr bool MULTIPLIES_WEIGHT = false;      // whether add_products multiplies by a fused weight
constexpr int64_t RANK_MULTIPLE = TILE_PAIRS;  // sums of outer products are padded to a multiple of it
inline int64_t padded_pairs(int64_t length) {
  const int64_t pairs = (length + 1) / 2;
  return pairs <= TILE_PAIRS ? pairs : rounded_up(pairs, TILE_PAIRS);
}
inline int lanes_a_row(int64_t) { return 1; }

inline TermCounts term_counts(const LowRank& l) { return l.bfloat16 ? TermCounts{1, 1} : TermCounts{3, 2}; }

// Writes the bf16 terms of (even[i], odd[i]). The last term is rounded; the others are truncated.
inline void store_terms(int terms, Vec even, Vec odd, uint32_t* to, int64_t stride) {
  for (; terms > 1; --terms, to += stride) {
    const Vec even_term = truncated(even), odd_term = truncated(odd);
    store_pairs(to, pairs_of(even_term, odd_term));
    even = fma(broadcast(-1.0f), even_term, even);
    odd = fma(broadcast(-1.0f), odd_term, odd);
  }
  store_pairs(to, pairs_of(even, odd));
}

// multiply_panel and outer_tiles are called between begin_products and end_products. begin_products sets the tiles up
// for rows of `pairs` pairs.
inline void begin_products(int64_t pairs) {
  const int64_t width = larger(1, smaller(pairs, TILE_PAIRS));
  TileConfig config;
  for (int tile = 0; tile <= RIGHT; ++tile) config.rows[tile] = TILE_PAIRS, config.row_bytes[tile] = TILE_BYTES;
  config.row_bytes[LEFT] = (uint16_t)(4 * width);
  config.rows[RIGHT] = (uint8_t)width;
  tile_configure(config);
}
inline void end_products() { tile_release(); }

// body(Index<0>()), body(Index<1>()), ...: registers are named by constants.
template <int N>
struct Index {
  static constexpr int value = N;
};
template <int Count, class Body>
inline void for_each(const Body& body) {
  if constexpr (Count > 0) {
    for_each<Count - 1>(body);
    body(Index<Count - 1>());
  }
}

// total[i] = total[i] + part[i], or total alone where part is not finite, for the 16 x 16 of a tile.
inline void add_tile(const float* part, float* total, int64_t stride) {
  for (int64_t i = 0; i < TILE_PAIRS; ++i)
    store(total + i * stride, add_finite(load(total + i * stride), load(part + i * LANES)));
}

// out[t][n] = Σ_k x[t][k] · w[n][k] for BLOCK_TOKENS tokens and the rows of w's panel p.
template <int Terms>
inline void multiply_panel_of(const Rows& x, const VnniMatrix& w, int64_t p, float* out, int64_t stride) {
  constexpr int SUMS = Terms > 1 ? 2 : 1;  // of the first term and of the others
  constexpr int HIGH = 4 / SUMS;           // tiles of 16 tokens at a time
  const uint32_t* panel = w.panel(p);
  alignas(64) float others[TILE_PAIRS * LANES];
  for (int64_t t = 0; t < BLOCK_TOKENS; t += HIGH * TILE_PAIRS) {
    const uint16_t* rows = x.data + t * x.stride;
    for_each<HIGH * SUMS>([](auto sum) { tile_zero<sum.value>(); });
    for (int64_t k = 0; k < w.pairs; k += TILE_PAIRS)
      for_each<Terms>([&](auto term) {
        constexpr int j = decltype(term)::value;
        tile_load<RIGHT>(panel + (k * Terms + j) * LANES, Terms * TILE_BYTES);
        for_each<HIGH>([&](auto high) {
          tile_load<LEFT>(rows + high.value * TILE_PAIRS * x.stride + 2 * k, 2 * x.stride);
          tile_multiply<decltype(high)::value * SUMS + (j > 0), LEFT, RIGHT>();
        });
      });
    for_each<HIGH>([&](auto high) {
      constexpr int i = decltype(high)::value;
      float* to = out + (t + i * TILE_PAIRS) * stride;
      tile_store<i * SUMS>(to, 4 * stride);
      if constexpr (SUMS > 1) {
        tile_store<i * SUMS + 1>(others, TILE_BYTES);
        add_tile(others, to, stride);
      }
    });
  }
}
inline void multiply_panel(const Rows& x, const VnniMatrix& w, int64_t p, float* out, int64_t stride) {
  w.terms == 1   ? multiply_panel_of<1>(x, w, p, out, stride)
  : w.terms == 2 ? multiply_panel_of<2>(x, w, p, out, stride)
                 : multiply_panel_of<3>(x, w, p, out, stride);
}

constexpr int64_t EPILOGUE_TOKENS = BLOCK_TOKENS;  // tokens that add_products takes

// Adds H · wᵀ to the output rows, whose columns are those of EPILOGUE_PANELS panels from p on, or what is
// left.
inline void add_products(const Rows& H, const VnniMatrix& w, const Rows&, int64_t p, int64_t, const OutputRows& to) {
  alignas(64) float products[BLOCK_TOKENS * EPILOGUE_PANELS * LANES] = {};
  for (int64_t v = 0; v < EPILOGUE_PANELS && p + v < w.panels; ++v)
    multiply_panel(H, w, p + v, products + v * LANES, EPILOGUE_PANELS * LANES);
  for (int64_t t = 0; t < to.tokens; ++t) {
    const float* row = products + t * EPILOGUE_PANELS * LANES;
    to.store(t, to.sum(t, 0, load(row)), to.sum(t, 1, load(row + LANES)));
  }
}

// packed[term][q][t / 2] = the terms of (H[t][q], H[t + 1][q]); H (BLOCK_TOKENS, padded_r).
inline void pack_H(const float* H, int64_t padded_r, int terms, uint32_t* packed) {
  for (int64_t q = 0; q < padded_r; q += LANES)
    for (int64_t t = 0; t < BLOCK_TOKENS; t += 2 * LANES) {
      Vec even[LANES], odd[LANES];  // by token, then by rank
      for (int64_t i = 0; i < LANES; ++i) {
        even[i] = load(H + (t + 2 * i) * padded_r + q);
        odd[i] = load(H + (t + 2 * i + 1) * padded_r + q);
      }
      transpose(even);
      transpose(odd);
      for (int64_t i = 0; i < LANES; ++i)
        store_terms(terms, even[i], odd[i], packed + (q + i) * BLOCK_PAIRS + t / 2, BLOCK_PAIRS * padded_r);
    }
}

// Tiles 0 to Width - 1 += H (16, BLOCK_PAIRS) · panel (BLOCK_PAIRS, Width · LANES).
template <int Width>
inline void add_outer(const uint32_t* H, const uint32_t* panel) {
  for (int64_t t = 0; t < BLOCK_PAIRS; t += TILE_PAIRS) {
    tile_load<LEFT>(H + t, 4 * BLOCK_PAIRS);
    for_each<Width>([&](auto v) {
      tile_load<RIGHT>(panel + (t * Width + v.value) * LANES, Width * TILE_BYTES);
      tile_multiply<v.value, LEFT, RIGHT>();
    });
  }
}

// sums (r rounded up to RANK_MULTIPLE, stride) += Σ_t H[t] · panel[t] for Width · LANES features.
template <int Width>
inline void outer_tiles(const uint32_t* H, int64_t r, int64_t padded_r, int terms, const uint32_t* panel, float* sums,
                        int64_t stride) {
  alignas(64) float others[TILE_PAIRS * LANES];
  for (int64_t q = 0; q < r; q += TILE_PAIRS) {
    float* to = sums + q * stride;
    for_each<Width>([&](auto v) { tile_load<v.value>(to + v.value * LANES, 4 * stride); });
    add_outer<Width>(H + q * BLOCK_PAIRS, panel);
    for_each<Width>([&](auto v) { tile_store<v.value>(to + v.value * LANES, 4 * stride); });
    if (terms == 1) continue;
    for_each<Width>([](auto v) { tile_zero<v.value>(); });
    for (int j = 1; j < terms; ++j) add_outer<Width>(H + (j * padded_r + q) * BLOCK_PAIRS, panel);
    for_each<Width>([&](auto v) {
      tile_store<v.value>(others, TILE_BYTES);
      add_tile(others, to + v.value * LANES, stride);
    });
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
