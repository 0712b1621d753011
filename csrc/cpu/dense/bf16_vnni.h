// Operands of bfloat16 products with fp32 sums, in the VNNI layout: the instructions multiply pairs of neighbours along
// the summed index, so that a pair lies in one 32-bit term.
//
// A pair of a bfloat16 adapter is one term and exact. A pair of an fp32 adapter takes several terms; bf16_dot_avx512.h
// and bf16_dot_amx.h each say what they hold. H and dH are rounded to bfloat16 once before y += H Bᵀ and dx += dH A,
// whose results are bfloat16 too.
#pragma once
#include "cpu/common/philox.h"
#include "cpu/dense/microkernels.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t ROW_MULTIPLE = 32;  // Rows are padded to a multiple of so many features
constexpr int64_t BLOCK_PAIRS = BLOCK_TOKENS / 2;
constexpr int64_t EPILOGUE_PANELS = 2;  // panels of y or dx finished together: whole cache lines
static_assert(LANES == 16, "as many as a tile has rows");

// How many terms hold a pair of operands, for results in fp32 and for results rounded to bfloat16.
struct TermCounts {
  int exact, rounded;
};

// columns[k][n] = at[n][k] for `rows` and `count` of LANES, else zero. One of the strides is 1.
template <class T>
inline void load_columns(const T* at, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t count,
                         Vec (&columns)[LANES]) {
  const bool by_rows = column_stride == 1;
  const int64_t lines = by_rows ? rows : count, width = by_rows ? count : rows;
  for (int64_t i = 0; i < LANES; ++i) {
    const T* line = at + i * (by_rows ? row_stride : column_stride);
    columns[i] = i < lines ? load_some(line, width) : zero();
  }
  if (by_rows) transpose(columns);
}

// terms[j] of LANES pairs (even[i], odd[i]) at to + j · stride. Defined with the products.
void store_terms(int terms, Vec even, Vec odd, uint32_t* to, int64_t stride);

// A matrix (rows, length) multiplied along `length`: panels of LANES rows, [panel][pair][term][row], zero past the
// ends. One of its strides is 1. A matrix of a few rows may fill the lanes with several pairs of each: lane l of pair k
// then has row l / n and its pair n · k + l % n, for n lanes a row.
class VnniMatrix {
 public:
  const int64_t panels, pairs;
  const int terms, lanes_a_row;

  template <class T>
  VnniMatrix(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length,
             int64_t padded_pairs, int terms, int lanes_a_row = 1)
      : panels((rows + LANES - 1) / LANES),
        pairs((padded_pairs + lanes_a_row - 1) / lanes_a_row),
        terms(terms),
        lanes_a_row(lanes_a_row),
        packed_(panels * panel_size()) {
    lanes_a_row == 1 ? pack_panels(matrix, row_stride, column_stride, rows, length)
                     : pack_few(matrix, row_stride, column_stride, rows, length);
  }

  const uint32_t* panel(int64_t p) const { return packed_ + p * panel_size(); }
  int64_t panel_size() const { return pairs * terms * LANES; }

 private:
  template <class T>
  void pack_panels(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length) {
    for_slots(slots_for(panels, panels * panel_size() / 2), panels, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        pack_panel(matrix + p * LANES * row_stride, row_stride, column_stride, smaller(LANES, rows - p * LANES), length,
                   packed_ + p * panel_size());
    });
  }

  template <class T>
  void pack_panel(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length,
                  uint32_t* to) const {
    for (int64_t k = 0; k < pairs; k += LANES / 2) {
      Vec columns[LANES];
      load_columns(matrix + 2 * k * column_stride, row_stride, column_stride, rows,
                   larger(0, smaller(LANES, length - 2 * k)), columns);
      for (int64_t i = 0; i < smaller(LANES / 2, pairs - k); ++i, to += terms * LANES)
        store_terms(terms, columns[2 * i], columns[2 * i + 1], to, LANES);
    }
  }

  template <class T>
  void pack_few(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t length) {
    for (int64_t k = 0; rows && k < pairs; ++k) {
      float pair[2][LANES] = {};
      for (int64_t lane = 0; lane < rows * lanes_a_row; ++lane)
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t column = 2 * (k * lanes_a_row + lane % lanes_a_row) + i;
          if (column < length)
            pair[i][lane] = as_float(matrix[lane / lanes_a_row * row_stride + column * column_stride]);
        }
      store_terms(terms, load(pair[0]), load(pair[1]), packed_ + k * terms * LANES, LANES);
    }
  }

  Buffer<uint32_t> packed_;
};

// BLOCK_TOKENS rows of bfloat16, zero past the last token and feature, up to a multiple of ROW_MULTIPLE features.
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
  uint64_t at(int64_t t, int64_t f) const { return bits[f / 64 * BLOCK_TOKENS + t] >> f % 64; }
};

// How many integers block_bits fills: the bits by feature, then by token.
inline int64_t bit_words(int64_t features) { return 2 * rounded_up(features, 64); }

inline TokenBits block_bits(const Dropout& dropout, int64_t first_token, int64_t features, uint64_t* bits) {
  if (!dropout.on) return {nullptr};
  const int64_t padded = rounded_up(features, 64);
  clear_elements(bits, padded);
  keep_bits(dropout, first_token, features, bits);
  for (int64_t f = 0; f < padded; f += 64) transpose_bits(bits + f, bits + padded + f);
  return {bits + padded};
}

// The block's rows as they lie in memory where they are whole, else a copy of (BLOCK_TOKENS, features up to
// ROW_MULTIPLE).
inline Rows block_rows(const uint16_t* rows, int64_t stride, int64_t tokens, int64_t features, TokenBits kept,
                       uint16_t* copy) {
  if (!kept.bits && tokens == BLOCK_TOKENS && features % ROW_MULTIPLE == 0) return {rows, stride};
  const int64_t width = rounded_up(features, ROW_MULTIPLE);
  clear_elements(copy, BLOCK_TOKENS * width);
  for (int64_t t = 0; t < tokens; ++t) {
    uint16_t* to = copy + t * width;
    copy_elements(to, rows + t * stride, features);
    for (int64_t f = 0; kept.bits && f < width; f += LANES) store(to + f, keep(kept.at(t, f), load(to + f)));
  }
  return {copy, width};
}

// The base layer's weight and bias where the kernels add x · weightᵀ + bias themselves. Where weight is null, the rows
// hold that part already.
struct FusedWeight {
  const VnniMatrix* weight;
  const uint16_t* bias;  // null for none
};

// Rows of y or dx, and the `count` features from `first` on that are finished together. They become the sum of what
// they hold or of the fused weight's part, of alpha · the low-rank product where dropout keeps it, and of `extra`, S's
// part.
struct OutputRows {
  uint16_t* rows;
  int64_t stride, tokens, first, count;
  float alpha;
  TokenBits kept;
  FusedWeight fused;
  const float* extra;  // (BLOCK_TOKENS, EPILOGUE_PANELS · LANES), null for none

  // Sum v of row t, of LANES features from first + v · LANES on.
  Vec sum(int64_t t, int64_t v, Vec product) const {
    if (kept.bits) product = keep(kept.at(t, first + v * LANES), product);
    const Vec scale = broadcast(alpha), before = fused.weight ? bias(v) : old(t, v);
    if (!extra) return fma(scale, product, before);
    return add(before, fma(scale, product, load(extra + (t * EPILOGUE_PANELS + v) * LANES)));
  }

  // Rounds both sums of row t, once.
  void store(int64_t t, Vec low, Vec high) const {
    uint16_t *to = rows + t * stride + first, padded[2 * LANES];
    if (count == 2 * LANES) return store_two(to, low, high);
    store_two(padded, low, high);
    std::memcpy(to, padded, sizeof(uint16_t) * count);
  }

 private:
  Vec bias(int64_t v) const { return fused.bias ? some_of(fused.bias + first, v) : zero(); }
  Vec old(int64_t t, int64_t v) const {
    const uint16_t* row = rows + t * stride + first;
    __builtin_prefetch(row + 8 * stride, 1, 2);  // the next rows: bf16_dot_avx512.h takes 8 at a time
    return some_of(row, v);
  }
  Vec some_of(const uint16_t* features, int64_t v) const { return load_some(features + v * LANES, count - v * LANES); }
};

// rounded (BLOCK_TOKENS, stride) = H (BLOCK_TOKENS, padded_r), to nearest even. From r up to padded_r it is zero,
// because an infinite x makes NaN there. What lies between padded_r and stride is left alone.
inline Rows round_H(const float* H, int64_t r, int64_t padded_r, uint16_t* rounded, int64_t stride) {
  for (int64_t t = 0; t < BLOCK_TOKENS; ++t)
    for (int64_t q = 0; q < padded_r; q += LANES) {
      const uint64_t real = r - q < LANES ? (1u << (r - q)) - 1 : 0xffff;
      store(rounded + t * stride + q, keep(real, load(H + t * padded_r + q)));
    }
  return {rounded, stride};
}

// panel[t / 2][i] = (rows[t][f + i], rows[t + 1][f + i]) for `width` features, a multiple of LANES.
inline void interleave_tokens(const Rows& rows, int64_t f, int64_t width, uint32_t* panel) {
  for (int64_t t = 0; t < BLOCK_TOKENS; t += 2) {
    const uint16_t* even = rows.data + t * rows.stride + f;
    for (int64_t i = 0; i < width; i += LANES, panel += LANES)
      store_pairs(panel, interleave(even + i, even + rows.stride + i));
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
