// The CSR parts over one block of tokens: x Sᵀ (SpMM) and dS = dyᵀ x at the pattern (SDDMM). Neighbouring rows that
// share their columns, as in column and block patterns, go four at a time, so that each load of x serves four rows as
// in a dense product.
#pragma once
#include "cpu/dense/microkernels.h"

namespace rosa {
namespace ROSA_ISA {

// The rows from i on, at most `limit`, that have the columns of row i, counted up to GROUP.
inline int64_t rows_alike(const Csr& s, int64_t i, int64_t limit) {
  const int64_t length = s.crow[i + 1] - s.crow[i];
  int64_t n = 1;
  for (; n < smaller(GROUP, limit); ++n) {
    const int32_t* next = s.crow + i + n;
    if (next[1] - next[0] != length) break;
    if (std::memcmp(s.col + s.crow[i], s.col + next[0], sizeof(int32_t) * length) != 0) break;
  }
  return n;
}

// out[t] += Σ_e values[e] · in[col[e]][t] over the entries of one row, for t below width, WIDTH vectors at a time.
template <int WIDTH>
inline void add_row(const Csr& s, int64_t i, const float* in, float* out, int64_t width) {
  for (int64_t t = 0; t < width; t += WIDTH * LANES) {
    Vec sums[WIDTH];
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) sums[v] = load(out + t + v * LANES);
    for (int64_t e = s.crow[i]; e < s.crow[i + 1]; ++e) {
      const float* row = in + s.col[e] * TOKENS + t;
      const Vec c = broadcast(s.values[e]);
#pragma GCC unroll 8
      for (int v = 0; v < WIDTH; ++v) sums[v] = fma(c, load(row + v * LANES), sums[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) store(out + t + v * LANES, sums[v]);
  }
}

// The same for GROUP rows from i on that have the same columns.
inline void add_rows_alike(const Csr& s, int64_t i, const float* in, float* out, int64_t width) {
  const int64_t length = s.crow[i + 1] - s.crow[i];
  const int32_t* col = s.col + s.crow[i];
  for (int64_t t = 0; t < width; t += STRIP * LANES) {
    Vec sums[GROUP][STRIP];
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) sums[j][v] = load(out + j * TOKENS + t + v * LANES);
    for (int64_t e = 0; e < length; ++e) {
      Vec inputs[STRIP];
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) inputs[v] = load(in + col[e] * TOKENS + t + v * LANES);
#pragma GCC unroll 4
      for (int j = 0; j < GROUP; ++j) {
        const Vec c = broadcast(s.values[s.crow[i + j] + e]);
#pragma GCC unroll 4
        for (int v = 0; v < STRIP; ++v) sums[j][v] = fma(c, inputs[v], sums[j][v]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) store(out + j * TOKENS + t + v * LANES, sums[j][v]);
  }
}

// out (rows, TOKENS) += rows [first, first + rows) of S · in, the first width columns.
inline void add_sparse(const Csr& s, int64_t first, int64_t rows, const float* in, float* out, int64_t width) {
  constexpr int WHOLE = TOKENS / LANES > 8 ? 8 : TOKENS / LANES;
  for (int64_t i = first; i < first + rows;) {
    if (s.crow[i] == s.crow[i + 1]) {
      ++i;
    } else if (s.structure != Structure::unstructured && rows_alike(s, i, first + rows - i) == GROUP) {
      add_rows_alike(s, i, in, out + (i - first) * TOKENS, width);
      i += GROUP;
    } else {
      if (width % (WHOLE * LANES) == 0)
        add_row<WHOLE>(s, i, in, out + (i - first) * TOKENS, width);
      else
        add_row<STRIP>(s, i, in, out + (i - first) * TOKENS, width);
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
  constexpr int WIDTH = TOKENS / LANES;
  DotProducts dots(dvalues);
  for (int64_t i = 0; i < rows; ++i) {
    const float* gi = g + i * TOKENS;
    for (int64_t e = s.crow[i]; e < s.crow[i + 1]; ++e) {
      const float* row = x + s.col[e] * TOKENS;
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
