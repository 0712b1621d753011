// The products of pairs.h by vectors of pairs. tile_products.h has the same functions by tiles.
//
// A pair of fp32 numbers is two words, as they are, and meets the halves of a pair of bfloat16 in fp32 multiply-adds:
// two for a pair, where bfloat16 terms that keep 24 bits would take three instructions of the same rate.
#pragma once
#include <type_traits>

#include "cpu/dense/bf16_vnni.h"

namespace rosa {
namespace ROSA_ISA {

constexpr bool SERVES_BASE = true;        // whether add_products multiplies a Target's base
constexpr int64_t RANK_MULTIPLE = GROUP;  // that sums of outer products are padded to
inline int64_t padded_pairs(int64_t length) { return (length + 1) / 2; }
inline int lanes_a_row(int64_t rows) { return rows <= LANES / 4 ? 4 : rows <= LANES / 2 ? 2 : 1; }

inline WordCounts word_counts(const LowRank& l) { return l.bfloat16 ? WordCounts{1, 1} : WordCounts{2, 2}; }

inline void store_words(int words, Vec even, Vec odd, uint32_t* to, int64_t stride) {
  if (words == 1) return store_pairs(to, pairs_of(even, odd));
  store_pairs(to, as_pairs(even));
  store_pairs(to + stride, as_pairs(odd));
}

// The words of LANES pairs, or those of one pair in every lane; dot: sum + the pairs · pairs of bfloat16.
template <int Words>
struct Operand;
template <>
struct Operand<1> {
  Pairs pairs;
  static Operand loaded(const uint32_t* words, int64_t) { return {load_pairs(words)}; }
  static Operand broadcast(const uint32_t* words, int64_t) { return {broadcast_pairs<1>(words)}; }
  Vec dot(Vec sum, Pairs x) const { return dot_pairs(sum, x, pairs); }
};
template <>
struct Operand<2> {
  Vec even, odd;
  static Operand loaded(const uint32_t* words, int64_t stride) {
    return {as_floats(load_pairs(words)), as_floats(load_pairs(words + stride))};
  }
  static Operand broadcast(const uint32_t* words, int64_t stride) {
    return {as_floats(broadcast_pairs<1>(words)), as_floats(broadcast_pairs<1>(words + stride))};
  }
  Vec dot(Vec sum, Pairs x) const { return fma(odd_of(x), odd, fma(even_of(x), even, sum)); }
};

// For a call: what multiply_panel and outer_tiles need before (for rows of so many pairs) and after.
inline void begin_products(int64_t) {}
inline void end_products() {}

// sums[t][v] += rows[t][0] · column[0] + rows[t][1] · column[1] for Tokens rows and LANES columns in the words of a
// pair. With several lanes a row of w, so many pairs of each of the rows.
template <int Words, int Lanes = 1, int Tokens, int Width>
inline void add_pair(const uint16_t* rows, int64_t row_stride, const uint32_t* column, int v,
                     Vec (&sums)[Tokens][Width]) {
  const auto pair = Operand<Words>::loaded(column, LANES);
#pragma GCC unroll 16
  for (int t = 0; t < Tokens; ++t) sums[t][v] = pair.dot(sums[t][v], broadcast_pairs<Lanes>(rows + t * row_stride));
}
template <int Tokens, int Width>
inline void set_zero(Vec (&sums)[Tokens][Width]) {
#pragma GCC unroll 16
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < Width; ++v) sums[t][v] = zero();
}

// out[t][q] = the sum over the lanes of row q, for 8 tokens; what lies beyond LANES / Lanes rows is left alone, and not
// used.
template <int Lanes>
inline void store_ranks(const Vec (&sums)[8], float* out, int64_t stride) {
  Vec joined[8];
  for (int i = 0; i < 8; ++i) joined[i] = sums[i];
  for (int lanes = Lanes, count = 8; lanes > 1; lanes /= 2, count /= 2)
    for (int i = 0; i < count / 2; ++i) joined[i] = add_neighbours(joined[2 * i], joined[2 * i + 1]);
  float lines[8 / Lanes * LANES];
  for (int i = 0; i < 8 / Lanes; ++i) store(lines + i * LANES, joined[i]);
  for (int t = 0; t < 8; ++t)
    std::memcpy(out + t * stride, lines + t * (LANES / Lanes), sizeof(float) * (LANES / Lanes));
}

// out[t][n] = Σ_k x[t][k] · w[n][k] for TOKENS tokens and the rows of w's panel p. 8 rows at a time: where they lie 4
// KiB apart, as many cache lines of one set are in use. Two sums a row hide the instructions' latency. The next rows
// are fetched to the second-level cache: so many streams are more than the processor follows.
template <int Words, int Lanes>
inline void multiply_panel_of(const Rows& x, const PackedPairs& w, int64_t p, float* out, int64_t stride) {
  constexpr int TOGETHER = 8, STEP = Words * LANES, ELEMENTS = 2 * Lanes;
  const uint32_t* panel = w.panel(p);
  for (int64_t t = 0; t < TOKENS; t += TOGETHER) {
    const uint16_t* rows = x.data + t * x.stride;
    Vec sums[TOGETHER][2];
    set_zero(sums);
    int64_t k = 0;
    for (; k + 2 <= w.pairs; k += 2) {
      if (k % (LANES / Lanes) == 0)
#pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; ++i) __builtin_prefetch(rows + (TOGETHER + i) * x.stride + ELEMENTS * k, 0, 2);
      add_pair<Words, Lanes>(rows + ELEMENTS * k, x.stride, panel + k * STEP, 0, sums);
      add_pair<Words, Lanes>(rows + ELEMENTS * (k + 1), x.stride, panel + (k + 1) * STEP, 1, sums);
    }
    if (k < w.pairs) add_pair<Words, Lanes>(rows + ELEMENTS * k, x.stride, panel + k * STEP, 0, sums);
    Vec ranks[TOGETHER];
#pragma GCC unroll 8
    for (int i = 0; i < TOGETHER; ++i) ranks[i] = add(sums[i][0], sums[i][1]);
    store_ranks<Lanes>(ranks, out + t * stride, stride);
  }
}
template <int Words>
inline void multiply_panel_of(const Rows& x, const PackedPairs& w, int64_t p, float* out, int64_t stride) {
  w.lanes_a_row == 1   ? multiply_panel_of<Words, 1>(x, w, p, out, stride)
  : w.lanes_a_row == 2 ? multiply_panel_of<Words, 2>(x, w, p, out, stride)
                       : multiply_panel_of<Words, 4>(x, w, p, out, stride);
}
inline void multiply_panel(const Rows& x, const PackedPairs& w, int64_t p, float* out, int64_t stride) {
  w.words == 1 ? multiply_panel_of<1>(x, w, p, out, stride) : multiply_panel_of<2>(x, w, p, out, stride);
}

constexpr int64_t UPDATE_TOKENS = 8;  // that add_products takes

template <int Words, int Panels>
inline void add_products_of(const Rows& ranks, const PackedPairs& w, const Rows& x, int64_t p, int64_t first_token,
                            const Target& to) {
  Vec sums[UPDATE_TOKENS][Panels];
  set_zero(sums);
  const auto add_rows = [&](auto words, const Rows& rows, const PackedPairs& packed) {
    constexpr int WORDS = decltype(words)::value;
    const uint16_t* first = rows.data + first_token * rows.stride;
    const uint32_t *low = packed.panel(p), *high = packed.panel(p + Panels - 1);
    for (int64_t k = 0; k < packed.pairs; ++k) {
      add_pair<WORDS>(first + 2 * k, rows.stride, low + k * WORDS * LANES, 0, sums);
      if (Panels == 2) add_pair<WORDS>(first + 2 * k, rows.stride, high + k * WORDS * LANES, Panels - 1, sums);
    }
  };
  add_rows(std::integral_constant<int, Words>(), ranks, w);
  const int64_t tokens = smaller(UPDATE_TOKENS, to.tokens - first_token);
#pragma GCC unroll 8
  for (int64_t t = 0; t < UPDATE_TOKENS; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < Panels; ++v)
      if (t < tokens) sums[t][v] = to.sum(first_token + t, v, sums[t][v]);
  if (to.base.weight) add_rows(std::integral_constant<int, 1>(), x, *to.base.weight);
#pragma GCC unroll 8
  for (int64_t t = 0; t < UPDATE_TOKENS; ++t)
    if (t < tokens) to.store(first_token + t, sums[t][0], Panels == 2 ? sums[t][Panels - 1] : zero());
}

// Adds ranks · wᵀ, and x times the target's base, to UPDATE_TOKENS rows of the target, whose columns are those of
// UPDATE_PANELS panels from p on, or what is left.
inline void add_products(const Rows& ranks, const PackedPairs& w, const Rows& x, int64_t p, int64_t first_token,
                         const Target& to) {
  if (to.count > LANES)
    w.words == 1 ? add_products_of<1, 2>(ranks, w, x, p, first_token, to)
                 : add_products_of<2, 2>(ranks, w, x, p, first_token, to);
  else
    w.words == 1 ? add_products_of<1, 1>(ranks, w, x, p, first_token, to)
                 : add_products_of<2, 1>(ranks, w, x, p, first_token, to);
}

// packed[word][t / 2][q] = the words of (ranks[t][q], ranks[t + 1][q]); ranks (TOKENS, padded_r).
inline void pack_ranks(const float* ranks, int64_t padded_r, int words, uint32_t* packed) {
  for (int64_t t = 0; t < TOKENS; t += 2, ranks += 2 * padded_r)
    for (int64_t q = 0; q < padded_r; q += LANES, packed += LANES)
      store_words(words, load(ranks + q), load(ranks + padded_r + q), packed, BLOCK_PAIRS * padded_r);
}

// sums[q][f] += Σ_t ranks[t][q] · panel[t][f] for GROUP ranks and Width vectors of features.
template <int Words, int Width>
inline void add_outer(const uint32_t* ranks, int64_t padded_r, const uint32_t* panel, float* sums, int64_t stride) {
  Vec acc[GROUP][Width];
#pragma GCC unroll 4
  for (int q = 0; q < GROUP; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) acc[q][v] = load(sums + q * stride + v * LANES);
  for (int64_t t = 0; t < BLOCK_PAIRS; ++t) {
    Pairs row[Width];
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) row[v] = load_pairs(panel + (t * Width + v) * LANES);
#pragma GCC unroll 4
    for (int q = 0; q < GROUP; ++q) {
      const auto c = Operand<Words>::broadcast(ranks + t * padded_r + q, BLOCK_PAIRS * padded_r);
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) acc[q][v] = c.dot(acc[q][v], row[v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < GROUP; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) store(sums + q * stride + v * LANES, acc[q][v]);
}

// sums (r rounded up to RANK_MULTIPLE, stride) += Σ_t ranks[t] · panel[t] for Width · LANES features.
template <int Width>
inline void outer_tiles(const uint32_t* ranks, int64_t r, int64_t padded_r, int words, const uint32_t* panel,
                        float* sums, int64_t stride) {
  for (int64_t q = 0; q < r; q += GROUP)
    words == 1 ? add_outer<1, Width>(ranks + q, padded_r, panel, sums + q * stride, stride)
               : add_outer<2, Width>(ranks + q, padded_r, panel, sums + q * stride, stride);
}

}  // namespace ROSA_ISA
}  // namespace rosa
