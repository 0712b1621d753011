// The products of bf16_vnni.h by vectors of pairs. bf16_dot_amx.h has the same functions by tiles.
//
// A pair of fp32 numbers is two terms, each a whole fp32 number. Each of them meets its half of a pair of bfloat16 in
// an fp32 multiply-add: two instructions for a pair, where bfloat16 terms that keep 24 bits would take three.
#pragma once
#include <type_traits>

#include "cpu/dense/bf16_vnni.h"

namespace rosa {
namespace ROSA_ISA {

constexpr bool MULTIPLIES_WEIGHT = true;  // whether add_products multiplies by a fused weight
constexpr int64_t RANK_MULTIPLE = GROUP;  // sums of outer products are padded to a multiple of it
inline int64_t padded_pairs(int64_t length) { return (length + 1) / 2; }
inline int lanes_a_row(int64_t rows) { return rows <= LANES / 4 ? 4 : rows <= LANES / 2 ? 2 : 1; }

inline TermCounts term_counts(const LowRank& l) { return l.bfloat16 ? TermCounts{1, 1} : TermCounts{2, 2}; }

inline void store_terms(int terms, Vec even, Vec odd, uint32_t* to, int64_t stride) {
  if (terms == 1) return store_pairs(to, pairs_of(even, odd));
  store_pairs(to, as_pairs(even));
  store_pairs(to + stride, as_pairs(odd));
}

// Holds the bf16 terms of LANES pairs, or of one pair repeated in every lane. dot() adds their products to sum.
template <int Terms>
struct Operand;
template <>
struct Operand<1> {
  Pairs pairs;
  static Operand loaded(const uint32_t* terms, int64_t) { return {load_pairs(terms)}; }
  static Operand broadcast(const uint32_t* terms, int64_t) { return {broadcast_pairs<1>(terms)}; }
  Vec dot(Vec sum, Pairs x) const { return dot_pairs(sum, x, pairs); }
};
template <>
struct Operand<2> {
  Vec even, odd;
  static Operand loaded(const uint32_t* terms, int64_t stride) {
    return {as_floats(load_pairs(terms)), as_floats(load_pairs(terms + stride))};
  }
  static Operand broadcast(const uint32_t* terms, int64_t stride) {
    return {as_floats(broadcast_pairs<1>(terms)), as_floats(broadcast_pairs<1>(terms + stride))};
  }
  Vec dot(Vec sum, Pairs x) const { return fma(odd_of(x), odd, fma(even_of(x), even, sum)); }
};

// multiply_panel and outer_tiles are called between these two. Vectors need no setting up.
inline void begin_products(int64_t) {}
inline void end_products() {}

// sums[t][v] += rows[t][0] · column[0] + rows[t][1] · column[1] for Tokens rows and LANES columns in the terms of a
// pair. With several lanes a row of w, so many pairs of each of the rows.
template <int Terms, int Lanes = 1, int Tokens, int Width>
inline void add_pair(const uint16_t* rows, int64_t row_stride, const uint32_t* column, int v,
                     Vec (&sums)[Tokens][Width]) {
  const auto pair = Operand<Terms>::loaded(column, LANES);
#pragma GCC unroll 16
  for (int t = 0; t < Tokens; ++t) sums[t][v] = pair.dot(sums[t][v], broadcast_pairs<Lanes>(rows + t * row_stride));
}
// out[t][q] = the sum over the lanes of row q, for 8 tokens; what lies beyond LANES / Lanes rows is left alone, and not
// used.
template <int Lanes>
inline void store_H(const Vec (&sums)[8], float* out, int64_t stride) {
  Vec joined[8];
  for (int i = 0; i < 8; ++i) joined[i] = sums[i];
  for (int lanes = Lanes, count = 8; lanes > 1; lanes /= 2, count /= 2)
    for (int i = 0; i < count / 2; ++i) joined[i] = add_neighbours(joined[2 * i], joined[2 * i + 1]);
  float lines[8 / Lanes * LANES];
  for (int i = 0; i < 8 / Lanes; ++i) store(lines + i * LANES, joined[i]);
  for (int t = 0; t < 8; ++t)
    std::memcpy(out + t * stride, lines + t * (LANES / Lanes), sizeof(float) * (LANES / Lanes));
}

// out[t][n] = Σ_k x[t][k] · w[n][k] for BLOCK_TOKENS tokens and the rows of w's panel p. x goes 8 rows at a time,
// because rows that lie 4 KiB apart use cache lines of one set. Two sums a row hide the instructions' latency. The next
// rows are prefetched to the second-level cache, because the processor does not follow so many streams.
template <int Terms, int Lanes>
inline void multiply_panel_of(const Rows& x, const VnniMatrix& w, int64_t p, float* out, int64_t stride) {
  constexpr int TOGETHER = 8, STEP = Terms * LANES, ELEMENTS = 2 * Lanes;
  const uint32_t* panel = w.panel(p);
  for (int64_t t = 0; t < BLOCK_TOKENS; t += TOGETHER) {
    const uint16_t* rows = x.data + t * x.stride;
    RegisterTile<TOGETHER, 2> tile;
    tile.clear();
    int64_t k = 0;
    for (; k + 2 <= w.pairs; k += 2) {
      if (k % (LANES / Lanes) == 0)
#pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; ++i) __builtin_prefetch(rows + (TOGETHER + i) * x.stride + ELEMENTS * k, 0, 2);
      add_pair<Terms, Lanes>(rows + ELEMENTS * k, x.stride, panel + k * STEP, 0, tile.sums);
      add_pair<Terms, Lanes>(rows + ELEMENTS * (k + 1), x.stride, panel + (k + 1) * STEP, 1, tile.sums);
    }
    if (k < w.pairs) add_pair<Terms, Lanes>(rows + ELEMENTS * k, x.stride, panel + k * STEP, 0, tile.sums);
    Vec H[TOGETHER];
#pragma GCC unroll 8
    for (int i = 0; i < TOGETHER; ++i) H[i] = add(tile.sums[i][0], tile.sums[i][1]);
    store_H<Lanes>(H, out + t * stride, stride);
  }
}
template <int Terms>
inline void multiply_panel_of(const Rows& x, const VnniMatrix& w, int64_t p, float* out, int64_t stride) {
  w.lanes_a_row == 1   ? multiply_panel_of<Terms, 1>(x, w, p, out, stride)
  : w.lanes_a_row == 2 ? multiply_panel_of<Terms, 2>(x, w, p, out, stride)
                       : multiply_panel_of<Terms, 4>(x, w, p, out, stride);
}
inline void multiply_panel(const Rows& x, const VnniMatrix& w, int64_t p, float* out, int64_t stride) {
  w.terms == 1 ? multiply_panel_of<1>(x, w, p, out, stride) : multiply_panel_of<2>(x, w, p, out, stride);
}

constexpr int64_t EPILOGUE_TOKENS = 8;  // tokens that add_products takes

template <int Terms, int Panels>
inline void add_products_of(const Rows& H, const VnniMatrix& w, const Rows& x, int64_t p, int64_t first_token,
                            const OutputRows& to) {
  RegisterTile<EPILOGUE_TOKENS, Panels> tile;
  auto& sums = tile.sums;
  tile.clear();
  const auto add_rows = [&](auto terms, const Rows& rows, const VnniMatrix& packed) {
    constexpr int TERMS = decltype(terms)::value;
    const uint16_t* first = rows.data + first_token * rows.stride;
    const uint32_t *low = packed.panel(p), *high = packed.panel(p + Panels - 1);
    for (int64_t k = 0; k < packed.pairs; ++k) {
      add_pair<TERMS>(first + 2 * k, rows.stride, low + k * TERMS * LANES, 0, sums);
      if (Panels == 2) add_pair<TERMS>(first + 2 * k, rows.stride, high + k * TERMS * LANES, Panels - 1, sums);
    }
  };
  add_rows(std::integral_constant<int, Terms>(), H, w);
  const int64_t tokens = smaller(EPILOGUE_TOKENS, to.tokens - first_token);
  tile.for_each([&](int t, int v) {
    if (t < tokens) sums[t][v] = to.sum(first_token + t, v, sums[t][v]);
  });
  if (to.fused.weight) add_rows(std::integral_constant<int, 1>(), x, *to.fused.weight);
#pragma GCC unroll 8
  for (int64_t t = 0; t < EPILOGUE_TOKENS; ++t)
    if (t < tokens) to.store(first_token + t, sums[t][0], Panels == 2 ? sums[t][Panels - 1] : zero());
}

// Adds H · wᵀ, and x times the fused weight, to EPILOGUE_TOKENS output rows, whose columns are those of
// EPILOGUE_PANELS panels from p on, or what is left.
inline void add_products(const Rows& H, const VnniMatrix& w, const Rows& x, int64_t p, int64_t first_token,
                         const OutputRows& to) {
  if (to.count > LANES)
    w.terms == 1 ? add_products_of<1, 2>(H, w, x, p, first_token, to)
                 : add_products_of<2, 2>(H, w, x, p, first_token, to);
  else
    w.terms == 1 ? add_products_of<1, 1>(H, w, x, p, first_token, to)
                 : add_products_of<2, 1>(H, w, x, p, first_token, to);
}

// packed[term][t / 2][q] = the terms of (H[t][q], H[t + 1][q]); H (BLOCK_TOKENS, padded_r).
inline void pack_H(const float* H, int64_t padded_r, int terms, uint32_t* packed) {
  for (int64_t t = 0; t < BLOCK_TOKENS; t += 2, H += 2 * padded_r)
    for (int64_t q = 0; q < padded_r; q += LANES, packed += LANES)
      store_terms(terms, load(H + q), load(H + padded_r + q), packed, BLOCK_PAIRS * padded_r);
}

// sums[q][f] += Σ_t H[t][q] · panel[t][f] for GROUP ranks and Width vectors of features.
template <int Terms, int Width>
inline void add_outer(const uint32_t* H, int64_t padded_r, const uint32_t* panel, float* sums, int64_t stride) {
  RegisterTile<GROUP, Width> tile;
  tile.load_from(sums, stride);
  for (int64_t t = 0; t < BLOCK_PAIRS; ++t) {
    Pairs row[Width];
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) row[v] = load_pairs(panel + (t * Width + v) * LANES);
#pragma GCC unroll 4
    for (int q = 0; q < GROUP; ++q) {
      const auto c = Operand<Terms>::broadcast(H + t * padded_r + q, BLOCK_PAIRS * padded_r);
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) tile.sums[q][v] = c.dot(tile.sums[q][v], row[v]);
    }
  }
  tile.store_to(sums, stride);
}

// sums (r rounded up to RANK_MULTIPLE, stride) += Σ_t H[t] · panel[t] for Width · LANES features.
template <int Width>
inline void outer_tiles(const uint32_t* H, int64_t r, int64_t padded_r, int terms, const uint32_t* panel, float* sums,
                        int64_t stride) {
  for (int64_t q = 0; q < r; q += GROUP)
    terms == 1 ? add_outer<1, Width>(H + q, padded_r, panel, sums + q * stride, stride)
               : add_outer<2, Width>(H + q, padded_r, panel, sums + q * stride, stride);
}

}  // namespace ROSA_ISA
}  // namespace rosa
