// Merging: a strip of weight + scaling · B A + S in one pass over the weight, or the weight alone widened to fp32.
#pragma once
#include "cpu/dense/register_tile.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t MERGED_ROWS = 16;      // rows finished together: S finds them in the cache
constexpr int64_t MERGED_COLUMNS = 256;  // whose coefficients of A stay in the first-level cache for all of those rows

// The strip's rows of weight and out, and of the low-rank factors.
template <class W>
struct MergedRows {
  MergedRows(const Merge& m, int64_t i)
      : weight((const W*)m.weight.data + (m.first_row + i) * m.weight.stride + m.first_column),
        out((float*)m.out.data + i * m.out.stride),
        A(m.low_rank.r ? m.low_rank.A + m.first_column : nullptr),
        B(m.low_rank.r ? m.low_rank.B + (m.first_row + i) * m.low_rank.r : nullptr) {}

  const W* weight;
  float* out;
  const float *A, *B;
};

// out[k] = weight[k] + scaling · Σ_q B[q] · A[q][k] for one row and the columns [k, end).
template <class W>
inline void merge_scalar(const Merge& m, const MergedRows<W>& row, int64_t k, int64_t end) {
  for (; k < end; ++k) {
    float low_rank = 0;
    for (int64_t q = 0; q < m.low_rank.r; ++q) low_rank += row.B[q] * row.A[q * m.in_features + k];
    row.out[k] = as_float(row.weight[k]) + m.low_rank.scaling * low_rank;
  }
}

// The same for Rows rows and one strip of vectors from k on.
template <int Rows, class W>
inline void merge_tile(const Merge& m, const MergedRows<W>& rows, int64_t k) {
  RegisterTile<Rows, STRIP> tile;
  tile.clear();
  for (int64_t q = 0; q < m.low_rank.r; ++q)
    tile.add_outer([&](int j) { return rows.B[j * m.low_rank.r + q]; },
                   [&](int v) { return load(rows.A + q * m.in_features + k + v * LANES); });
  const Vec scale = broadcast(m.low_rank.scaling);
  tile.for_each([&](int j, int v) {
    const W* weight = rows.weight + j * m.weight.stride + k + v * LANES;
    __builtin_prefetch(weight + MERGED_ROWS * m.weight.stride, 0, 2);
    store(rows.out + j * m.out.stride + k + v * LANES, fma(scale, tile.sums[j][v], load(weight)));
  });
}

// Rows [begin, end) of the strip, without S.
template <class W>
inline void merge_dense(const Merge& m, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < m.columns; k += MERGED_COLUMNS) {
    const int64_t panel_end = smaller(k + MERGED_COLUMNS, m.columns);
    int64_t i = begin;
    for (int64_t rows = 4; i < end; i += rows) {
      if (end - i < 4) rows = 1;
      const MergedRows<W> at(m, i);
      int64_t c = k;
      for (; c + STRIP * LANES <= panel_end; c += STRIP * LANES)
        rows == 4 ? merge_tile<4>(m, at, c) : merge_tile<1>(m, at, c);
      for (int64_t j = 0; c < panel_end && j < rows; ++j) merge_scalar(m, MergedRows<W>(m, i + j), c, panel_end);
    }
  }
}

inline void add_entry(float* out, float value) { *out += value; }
inline void add_entry(uint16_t* out, float value) {  // bfloat16, to nearest even; NaN stays NaN
  const float total = as_float(*out) + value;
  uint32_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  *out = (uint16_t)((total != total ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The first entry of [begin, end), sorted by column, at this column or after it.
inline int64_t entry_from_column(const Csr& s, int64_t begin, int64_t end, int64_t column) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (s.col[middle] < column)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// out += the strip's part of S's row; all of its columns at once where S has them all.
template <class T>
inline void add_sparse_row(const Merge& m, int64_t i, T* out) {
  const Csr& s = m.sparse;
  int64_t e = s.crow[m.first_row + i], end = s.crow[m.first_row + i + 1];
  if (m.columns < m.in_features) {
    e = entry_from_column(s, e, end, m.first_column);
    end = entry_from_column(s, e, end, m.first_column + m.columns);
  }
  T* const at = out - m.first_column;
  if (end - e == m.columns)
    for (; e + LANES <= end; e += LANES) {
      T* to = at + s.col[e];
      store(to, add(load(to), load(s.values + e)));
    }
  for (; e < end; ++e) add_entry(at + s.col[e], s.values[e]);
}

template <class T>
inline void copy_rows(const T* weight, int64_t weight_stride, int64_t rows, int64_t columns, T* out, int64_t stride) {
  if (weight_stride == columns && stride == columns) columns *= rows, rows = 1;  // a long copy is a faster one
  for (int64_t j = 0; j < rows; ++j) copy_elements(out + j * stride, weight + j * weight_stride, columns);
}
inline void copy_rows(const uint16_t* weight, int64_t weight_stride, int64_t rows, int64_t columns, float* out,
                      int64_t stride) {
  for (int64_t j = 0; j < rows; ++j, weight += weight_stride, out += stride) {
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) store(out + k, load(weight + k));
    for (; k < columns; ++k) out[k] = as_float(weight[k]);
  }
}

// Rows [begin, end) of the strip; weight in W, out in T.
template <class W, class T>
void merge_some(const Merge& m, int64_t begin, int64_t end) {
  T* out = (T*)m.out.data + begin * m.out.stride;
  if (m.low_rank.r)
    merge_dense<W>(m, begin, end);
  else
    copy_rows((const W*)m.weight.data + (m.first_row + begin) * m.weight.stride + m.first_column, m.weight.stride,
              end - begin, m.columns, out, m.out.stride);
  for (int64_t j = begin; m.sparse.values && j < end; ++j, out += m.out.stride) add_sparse_row(m, j, out);
}

template <class W, class T>
void merge_rows(const Merge& m) {
  for_slots(slots_for(m.rows, m.rows * m.columns), m.rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += MERGED_ROWS) merge_some<W, T>(m, i, smaller(i + MERGED_ROWS, end));
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
