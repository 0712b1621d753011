// S in CSR form over one block of tokens: x Sᵀ (SpMM) and dS = dyᵀ x at the pattern (SDDMM). Neighbouring rows that
// share their columns, as in column and block patterns, go four at a time, so that each load of x serves four rows.
#pragma once
#include "cpu/dense/microkernels.h"

namespace rosa {
namespace ROSA_ISA {

// How many rows from i on, at most GROUP and at most `limit`, have the columns of row i.
inline int64_t rows_sharing_columns(const Csr& s, int64_t i, int64_t limit) {
  const int64_t length = s.crow[i + 1] - s.crow[i];
  int64_t n = 1;
  for (; n < smaller(GROUP, limit); ++n) {
    const int32_t* next = s.crow + i + n;
    if (next[1] - next[0] != length) break;
    if (std::memcmp(s.col + s.crow[i], s.col + next[0], sizeof(int32_t) * length) != 0) break;
  }
  return n;
}

// out[j][t] += Σ_e values[e] · in[col[e]][t] over the entries of Rows rows from i on that have the same columns, for t
// below width, Width vectors at a time.
template <int Rows, int Width>
inline void add_rows(const Csr& s, int64_t i, const float* in, float* out, int64_t width) {
  const int64_t length = s.crow[i + 1] - s.crow[i];
  const int32_t* col = s.col + s.crow[i];
  const float* values = s.values + s.crow[i];  // a row's values follow those of the one before it
  for (int64_t t = 0; t < width; t += Width * LANES) {
    RegisterTile<Rows, Width> tile;
    tile.load_from(out + t, BLOCK_TOKENS);
    for (int64_t e = 0; e < length; ++e)
      tile.add_outer([&](int j) { return values[j * length + e]; },
                     [&](int v) { return load(in + col[e] * BLOCK_TOKENS + t + v * LANES); });
    tile.store_to(out + t, BLOCK_TOKENS);
  }
}

// out (rows, BLOCK_TOKENS) += rows [first, first + rows) of S · in, the first width columns.
inline void add_sparse(const Csr& s, int64_t first, int64_t rows, const float* in, float* out, int64_t width) {
  constexpr int WHOLE = BLOCK_TOKENS / LANES > 8 ? 8 : BLOCK_TOKENS / LANES;
  for (int64_t i = first; i < first + rows;) {
    if (s.crow[i] == s.crow[i + 1]) {
      ++i;
    } else if (s.structure != Structure::unstructured && rows_sharing_columns(s, i, first + rows - i) == GROUP) {
      add_rows<GROUP, STRIP>(s, i, in, out + (i - first) * BLOCK_TOKENS, width);
      i += GROUP;
    } else {
      if (width % (WHOLE * LANES) == 0)
        add_rows<1, WHOLE>(s, i, in, out + (i - first) * BLOCK_TOKENS, width);
      else
        add_rows<1, STRIP>(s, i, in, out + (i - first) * BLOCK_TOKENS, width);
      ++i;
    }
  }
}

// Adds dot products to consecutive gradient values, LANES at a time: one transpose serves LANES horizontal sums.
class DotProducts {
 public:
  explicit DotProducts(float* out) : out_(out) {}
  void push(Vec products) {
    store(pending_ + count_ * LANES, products);
    if (++count_ == LANES) {
      Vec lines[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) lines[i] = load(pending_ + i * LANES);
      transpose(lines);
#pragma GCC unroll 16
      for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lines[i] = add(lines[i], lines[i + width]);
      store(out_, add(load(out_), lines[0]));
      out_ += LANES;
      count_ = 0;
    }
  }
  void finish() {
    for (int i = 0; i < count_; ++i) *out_++ += sum(load(pending_ + i * LANES));
    count_ = 0;
  }

 private:
  alignas(64) float pending_[LANES * LANES];
  float* out_;
  int count_ = 0;
};

// dvalues[e] += Σ_t g[row_e][t] · x[col_e][t] over every entry, in order.
inline void sample(const Csr& s, int64_t rows, const float* g, const float* x, float* dvalues) {
  constexpr int WIDTH = BLOCK_TOKENS / LANES;
  DotProducts dots(dvalues);
  for (int64_t i = 0; i < rows; ++i) {
    const float* gi = g + i * BLOCK_TOKENS;
    for (int64_t e = s.crow[i]; e < s.crow[i + 1]; ++e) {
      const float* row = x + s.col[e] * BLOCK_TOKENS;
      Vec products = mul(load(gi), load(row));
#pragma GCC unroll 16
      for (int v = 1; v < WIDTH; ++v) products = fma(load(gi + v * LANES), load(row + v * LANES), products);
      dots.push(products);
    }
  }
  dots.finish();
}

}  // namespace ROSA_ISA
}  // namespace rosa
