// An unstructured S over a block of tokens of bfloat16, which is packed feature-major in pairs of tokens. Its entries
// load from the second-level cache, and bfloat16 takes half the space of fp32 there.
#pragma once
#include "cpu/dense/bf16_vnni.h"
#include "cpu/sparse/spmm.h"

namespace rosa {
namespace ROSA_ISA {

inline bool in_pairs(const Csr& s) { return s.values && s.structure == Structure::unstructured; }

// packed[f][t / 2] = (rows[t][f], rows[t + 1][f]) for `features`, rounded up to ROW_MULTIPLE: a cache line of each row
// at a time.
inline void pack_token_pairs(const Rows& rows, int64_t features, uint32_t* packed) {
  for (int64_t panel = 0; panel < features; panel += ROW_MULTIPLE)
    for (int64_t t = 0; t < BLOCK_TOKENS; t += 2 * LANES)
      for (int64_t f = panel; f < panel + ROW_MULTIPLE; f += LANES)
        transpose_square(
            [&](int i) {
              const uint16_t* even = rows.data + (t + 2 * i) * rows.stride + f;
              return as_floats(interleave(even, even + rows.stride));
            },
            [&](int i, Vec column) { store_pairs(packed + (f + i) * BLOCK_PAIRS + t / 2, as_pairs(column)); });
}

// out[t][f] = Σ_e values[e] · packed[col[e]][t] over row first + f of S, for `rows` rows and zero up to width, a
// multiple of LANES.
inline void multiply_sparse_bf16(const Csr& s, int64_t first, int64_t rows, const uint32_t* packed, float* out,
                                 int64_t width) {
  constexpr int VECTORS = BLOCK_PAIRS / LANES;
  for (int64_t f = 0; f < width; f += LANES) {
    Vec sums[VECTORS][2][LANES];  // of even tokens and of odd ones
    for (int64_t i = 0; i < LANES; ++i) {
      Vec even[VECTORS], odd[VECTORS];
      for (int v = 0; v < VECTORS; ++v) even[v] = odd[v] = zero();
      const bool any = f + i < rows;
      for (int64_t e = any ? s.crow[first + f + i] : 0; any && e < s.crow[first + f + i + 1]; ++e) {
        const uint32_t* tokens = packed + s.col[e] * BLOCK_PAIRS;
        const Vec c = broadcast(s.values[e]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          const Pairs pairs = load_pairs(tokens + v * LANES);
          even[v] = fma(c, even_of(pairs), even[v]);
          odd[v] = fma(c, odd_of(pairs), odd[v]);
        }
      }
      for (int v = 0; v < VECTORS; ++v) sums[v][0][i] = even[v], sums[v][1][i] = odd[v];
    }
    for (int v = 0; v < VECTORS; ++v)
      for (int is_odd = 0; is_odd < 2; ++is_odd) {
        transpose(sums[v][is_odd]);
        for (int64_t i = 0; i < LANES; ++i) store(out + (2 * (v * LANES + i) + is_odd) * width + f, sums[v][is_odd][i]);
      }
  }
}

// dvalues[e] += Σ_t dy[row_e][t] · x[col_e][t] over every entry, in order; dy and x packed.
inline void sample_bf16(const Csr& s, int64_t rows, const uint32_t* dy, const uint32_t* x, float* dvalues) {
  constexpr int VECTORS = BLOCK_PAIRS / LANES;
  DotProducts dots(dvalues);
  for (int64_t i = 0; i < rows; ++i) {
    Pairs of_row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) of_row[v] = load_pairs(dy + i * BLOCK_PAIRS + v * LANES);
    for (int64_t e = s.crow[i]; e < s.crow[i + 1]; ++e) {
      const uint32_t* tokens = x + s.col[e] * BLOCK_PAIRS;
      Vec products = zero();
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) products = dot_pairs(products, of_row[v], load_pairs(tokens + v * LANES));
      dots.push(products);
    }
  }
  dots.finish();
}

}  // namespace ROSA_ISA
}  // namespace rosa
