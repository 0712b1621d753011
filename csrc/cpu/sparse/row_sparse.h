// Patterns of whole rows or whole columns are small dense matrices between gathered or scattered rows, so that their
// products are those of the low-rank path. A column pattern of S is a row pattern of Sᵀ.
#pragma once
#include "cpu/dense/microkernels.h"

namespace rosa {
namespace ROSA_ISA {

// How many whole rows of this length S has; 0 for other structures.
inline int64_t whole_row_count(const Csr& s, int64_t length) {
  return s.values && s.structure == Structure::row ? s.nnz / length : 0;
}

// out[i] += products[n] for each row i of [first, first + rows) that is the n-th of S's whole rows.
inline void scatter_rows(const Csr& s, int64_t length, int64_t first, int64_t rows, const float* products, float* out) {
  for (int64_t i = first; i < first + rows; ++i) {
    if (s.crow[i] == s.crow[i + 1]) continue;
    const float* from = products + s.crow[i] / length * BLOCK_TOKENS;
    float* to = out + (i - first) * BLOCK_TOKENS;
    for (int64_t t = 0; t < BLOCK_TOKENS; t += LANES) store(to + t, add(load(to + t), load(from + t)));
  }
}

// How many whole rows or columns dS has; 0 for other structures, and where dS is not wanted.
inline int64_t touched_count(const Backward& b) {
  if (!b.dvalues) return 0;
  const Structure s = b.sparse.structure;
  return s == Structure::row      ? b.sparse.nnz / b.in_features
         : s == Structure::column ? b.sparse.nnz / b.out_features
                                  : 0;
}

// The features of one side that a row or column pattern touches: rows of dy, or columns of x.
inline void touched_features(const Csr& s, int64_t out_features, int64_t count, int32_t* touched) {
  if (s.structure == Structure::column) {
    std::memcpy(touched, s.col, sizeof(int32_t) * count);
    return;
  }
  for (int64_t i = 0; i < out_features; ++i)
    if (s.crow[i] != s.crow[i + 1]) *touched++ = (int32_t)i;
}

// gathered[t][n] = rows[t][features[n]] as fp32, then zeros up to `stride`.
template <class T>
inline void gather_columns(const T* rows, int64_t row_stride, int64_t tokens, const int32_t* features, int64_t count,
                           float* gathered, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t, rows += row_stride, gathered += stride) {
    for (int64_t n = 0; n < count; ++n) gathered[n] = as_float(rows[features[n]]);
    for (int64_t n = count; n < stride; ++n) gathered[n] = 0;
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
