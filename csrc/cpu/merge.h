// weight + scaling · B A + S into a new matrix, one pass over the weight.
#pragma once
#include "scratch.h"

namespace rosa {
namespace ROSA_ISA {

// out[i][k] = weight[i][k] + Σ_q coefficients[q] · A[q][k] for one row and `width` features from k on.
inline void merge_scalar(const Merge& m, int64_t i, int64_t k, int64_t width) {
  const float* weight = (const float*)m.weight.data + i * m.weight.stride;
  float* out = (float*)m.out.data + i * m.out.stride;
  for (; width > 0; ++k, --width) {
    float delta = 0;
    for (int64_t q = 0; q < m.low_rank.r; ++q) delta += m.low_rank.B[i * m.low_rank.r + q] * m.low_rank.A[q * m.in_features + k];
    out[k] = weight[k] + m.low_rank.scaling * delta;
  }
}

// The same for Rows rows from i on and one strip of vectors from k on.
template <int Rows>
inline void merge_tile(const Merge& m, int64_t i, int64_t k) {
  Vec sums[Rows][STRIP];
#pragma GCC unroll 4
  for (int j = 0; j < Rows; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < STRIP; ++v) sums[j][v] = zero();
  for (int64_t q = 0; q < m.low_rank.r; ++q) {
    Vec a[STRIP];
#pragma GCC unroll 4
    for (int v = 0; v < STRIP; ++v) a[v] = load(m.low_rank.A + q * m.in_features + k + v * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) {
      const Vec c = broadcast(m.low_rank.B[(i + j) * m.low_rank.r + q]);
#pragma GCC unroll 4
      for (int v = 0; v < STRIP; ++v) sums[j][v] = fma(c, a[v], sums[j][v]);
    }
  }
  const Vec scale = broadcast(m.low_rank.scaling);
#pragma GCC unroll 4
  for (int j = 0; j < Rows; ++j) {
    const float* weight = (const float*)m.weight.data + (i + j) * m.weight.stride + k;
    float* out = (float*)m.out.data + (i + j) * m.out.stride + k;
#pragma GCC unroll 4
    for (int v = 0; v < STRIP; ++v) store(out + v * LANES, fma(scale, sums[j][v], load(weight + v * LANES)));
  }
}

inline void merge_low_rank(const Merge& m, int64_t begin, int64_t end) {
  constexpr int64_t WIDTH = STRIP * LANES;
  int64_t k = 0;
  for (; k + WIDTH <= m.in_features; k += WIDTH) {
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) merge_tile<4>(m, i, k);
    for (; i < end; ++i) merge_tile<1>(m, i, k);
  }
  for (int64_t i = begin; k < m.in_features && i < end; ++i) merge_scalar(m, i, k, m.in_features - k);
}

inline void add_entry(float* out, float value) { *out += value; }
inline void add_entry(uint16_t* out, float value) {  // bfloat16, to nearest even; NaN stays NaN
  uint32_t bits = (uint32_t)*out << 16;
  float total;
  std::memcpy(&total, &bits, sizeof total);
  total += value;
  std::memcpy(&bits, &total, sizeof bits);
  *out = (uint16_t)((total != total ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// out += row i of S; a whole row at once where S has all of it.
template <class T>
inline void add_sparse_row(const Csr& s, int64_t i, int64_t in_features, T* out) {
  int64_t e = s.crow[i], end = s.crow[i + 1];
  if (end - e == in_features)
    for (; e + LANES <= end; e += LANES) {
      T* to = out + (e - s.crow[i]);
      store(to, add(load(to), load(s.values + e)));
    }
  for (; e < end; ++e) add_entry(out + s.col[e], s.values[e]);
}

template <class T>
void merge_rows(const Merge& m) {
  for_slots(larger(1, smaller(thread_count(), m.out_features * m.in_features / 32768)), m.out_features,
            [&](int64_t, int64_t begin, int64_t end) {
              if (m.low_rank.r) {
                merge_low_rank(m, begin, end);
              } else {
                for (int64_t i = begin; i < end; ++i)
                  std::memcpy((T*)m.out.data + i * m.out.stride, (const T*)m.weight.data + i * m.weight.stride,
                              sizeof(T) * m.in_features);
              }
              for (int64_t i = begin; m.sparse.values && i < end; ++i)
                add_sparse_row(m.sparse, i, m.in_features, (T*)m.out.data + i * m.out.stride);
            });
}

}  // namespace ROSA_ISA
}  // namespace rosa
