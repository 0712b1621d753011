// Operands of bfloat16 products with fp32 sums. The instructions multiply pairs of neighbours along the summed index.
//
// bfloat16 adapters are exact operands; their H and dH are rounded to bfloat16 once. Of fp32 adapters each number is a sum
// of bfloat16 terms of 8 bits: three hold its 24 bits exactly, for A in H = x Aᵀ, B in dH = dy B, and H and dH in dB and dA.
// In the products that end in bfloat16, y += H Bᵀ and dx += dH A, H and dH are rounded once and two terms of B and A err by
// 2^-15. Exact down to 2^-126: the instructions take denormals as zeros.
//
// All terms but the first are summed apart: where x is infinite a term of 0 makes that sum NaN, and it is left out, for the
// first term alone then has the infinity that fp32 arithmetic gives.
#pragma once
#include "philox.h"
#include "products.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t ROW_MULTIPLE = 32;  // features that Rows are padded to
constexpr int64_t BLOCK_PAIRS = TOKENS / 2;
static_assert(LANES == 16, "as many as a tile has rows");

struct TermCounts {
  int exact, rounded;  // of operands of fp32 results, and of bfloat16 results
};
inline TermCounts term_counts(const LowRank& l) { return l.bfloat16 ? TermCounts{1, 1} : TermCounts{3, 2}; }

// a as a sum of terms; the last one is left to be rounded.
template <int Terms>
inline void split(Vec a, Vec (&terms)[Terms]) {
#pragma GCC unroll 3
  for (int j = 0; j + 1 < Terms; ++j) {
    terms[j] = truncated(a);
    a = fma(broadcast(-1.0f), terms[j], a);
  }
  terms[Terms - 1] = a;
}

// packed[j] = the j-th terms of (even[i], odd[i]).
template <int Terms>
inline void store_terms(Vec even, Vec odd, uint32_t* packed, int64_t term_stride) {
  Vec low[Terms], high[Terms];
  split(even, low);
  split(odd, high);
#pragma GCC unroll 3
  for (int j = 0; j < Terms; ++j) store_pairs(packed + j * term_stride, pairs_of(low[j], high[j]));
}

// columns[k][n] = at[n][k] for `rows` and `count` of LANES, else zero. One of the strides is 1.
inline void load_columns(const float* at, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t count,
                         Vec (&columns)[LANES]) {
  const bool by_rows = column_stride == 1;
  const int64_t lines = by_rows ? rows : count, width = by_rows ? count : rows;
  for (int64_t i = 0; i < LANES; ++i) {
    const float* line = at + i * (by_rows ? row_stride : column_stride);
    float padded[LANES] = {};
    if (i < lines && width < LANES) std::memcpy(padded, line, sizeof(float) * width);
    columns[i] = load(i < lines && width == LANES ? line : padded);
  }
  if (by_rows) transpose(columns);
}

// A matrix (rows, length) multiplied along `length`: panels of LANES rows, [panel][pair][term][row], zero past the ends.
class PackedPairs {
 public:
  const int64_t panels, pairs;
  const int terms;

  PackedPairs(const float* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length,
              int64_t padded_pairs, int terms)
      : panels((rows + LANES - 1) / LANES), pairs(padded_pairs), terms(terms), packed_(panels * panel_size()) {
    for (int64_t n = 0; n < rows; n += LANES)
      for (int64_t k = 0; k < pairs; k += LANES / 2) {
        const int64_t count = larger(0, smaller(LANES, length - 2 * k));
        Vec columns[LANES];
        load_columns(matrix + n * row_stride + 2 * k * column_stride, row_stride, column_stride,
                     smaller(LANES, rows - n), count, columns);
        uint32_t* to = packed_ + n / LANES * panel_size() + k * terms * LANES;
        for (int64_t i = 0; i < smaller(LANES / 2, pairs - k); ++i, to += terms * LANES)
          terms == 1   ? store_terms<1>(columns[2 * i], columns[2 * i + 1], to, LANES)
          : terms == 2 ? store_terms<2>(columns[2 * i], columns[2 * i + 1], to, LANES)
                       : store_terms<3>(columns[2 * i], columns[2 * i + 1], to, LANES);
      }
  }

  const uint32_t* panel(int64_t p) const { return packed_ + p * panel_size(); }

 private:
  int64_t panel_size() const { return pairs * terms * LANES; }
  Buffer<uint32_t> packed_;
};

// TOKENS rows of bfloat16, zero past the last token and feature, up to a multiple of ROW_MULTIPLE features.
struct Rows {
  const uint16_t* data;
  int64_t stride;
};

// out[t] bit f = in[f] bit t for 64 of each.
inline void transpose_bits(const uint64_t* in, uint64_t* out) {
  std::memcpy(out, in, 64 * sizeof(uint64_t));
  uint64_t low = 0xffffffffu;
  for (int width = 32; width; width >>= 1, low ^= low << width)
    for (int i = 0; i < 64; i = ((i | width) + 1) & ~width) {
      const uint64_t swapped = (out[i] >> width ^ out[i | width]) & low;
      out[i] ^= swapped << width;
      out[i | width] ^= swapped;
    }
}

// Dropout's bits by token: bits of LANES features from f on, a multiple of LANES, in the low bits.
struct TokenBits {
  const uint64_t* bits;  // [feature / 64][token], null without dropout
  uint64_t at(int64_t t, int64_t f) const { return bits[f / 64 * TOKENS + t] >> f % 64; }
};

// Words that block_bits fills: the bits by feature, then by token.
inline int64_t bit_words(int64_t features) { return 2 * rounded_up(features, 64); }

inline TokenBits block_bits(const Dropout& dropout, int64_t first_token, int64_t features, uint64_t* words) {
  if (!dropout.on) return {nullptr};
  const int64_t padded = rounded_up(features, 64);
  std::memset(words, 0, sizeof(uint64_t) * padded);
  keep_bits(dropout, first_token, features, words);
  for (int64_t f = 0; f < padded; f += 64) transpose_bits(words + f, words + padded + f);
  return {words + padded};
}

// The block's rows as they lie in memory where they are whole, else a copy of (TOKENS, features up to ROW_MULTIPLE).
inline Rows block_rows(const uint16_t* rows, int64_t stride, int64_t tokens, int64_t features, TokenBits kept,
                       uint16_t* copy) {
  if (!kept.bits && tokens == TOKENS && features % ROW_MULTIPLE == 0) return {rows, stride};
  const int64_t width = rounded_up(features, ROW_MULTIPLE);
  std::memset(copy, 0, sizeof(uint16_t) * TOKENS * width);
  for (int64_t t = 0; t < tokens; ++t) {
    uint16_t* to = copy + t * width;
    std::memcpy(to, rows + t * stride, sizeof(uint16_t) * features);
    for (int64_t f = 0; kept.bits && f < width; f += LANES) store(to + f, keep(kept.at(t, f), load(to + f)));
  }
  return {copy, width};
}

// rounded (TOKENS, stride) = ranks (TOKENS, padded_r), to nearest even, and zero from r up to padded_r, where an infinite x
// has made NaN. What lies between padded_r and stride is left alone.
inline Rows round_ranks(const float* ranks, int64_t r, int64_t padded_r, uint16_t* rounded, int64_t stride) {
  for (int64_t t = 0; t < TOKENS; ++t)
    for (int64_t q = 0; q < padded_r; q += LANES) {
      const uint64_t real = r - q < LANES ? (1u << (r - q)) - 1 : 0xffff;
      store(rounded + t * stride + q, keep(real, load(ranks + t * padded_r + q)));
    }
  return {rounded, stride};
}

// panel[t / 2][i] = (rows[t][f + i], rows[t + 1][f + i]) for `width` features, a multiple of LANES.
inline void interleave_tokens(const Rows& rows, int64_t f, int64_t width, uint32_t* panel) {
  for (int64_t t = 0; t < TOKENS; t += 2) {
    const uint16_t* even = rows.data + t * rows.stride + f;
    for (int64_t i = 0; i < width; i += LANES, panel += LANES)
      store_pairs(panel, interleave(even + i, even + rows.stride + i));
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
