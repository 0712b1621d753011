// The low-rank products of a block of tokens from operands of bfloat16. Included after pair_products.h or tile_products.h.
#pragma once
#include "update.h"

namespace rosa {
namespace ROSA_ISA {

// out[t][n] = Σ_k x[t][k] · w[n][k] for TOKENS tokens and the rows of w's panel p.
inline void multiply_panel(const Rows& x, const PackedPairs& w, int64_t p, float* out, int64_t stride) {
  w.terms == 1   ? multiply_panel_of<1>(x, w.panel(p), w.pairs, out, stride)
  : w.terms == 2 ? multiply_panel_of<2>(x, w.panel(p), w.pairs, out, stride)
                 : multiply_panel_of<3>(x, w.panel(p), w.pairs, out, stride);
}

inline void pack_ranks(const float* ranks, int64_t padded_r, int terms, uint32_t* packed) {
  terms == 1 ? pack_ranks_of<1>(ranks, padded_r, packed) : pack_ranks_of<3>(ranks, padded_r, packed);
}

// out (TOKENS, stride) = x · wᵀ, with w's rows padded to a multiple of LANES.
inline void multiply_rows(const Rows& x, const PackedPairs& w, float* out, int64_t stride) {
  begin_products(w.pairs);
  for (int64_t p = 0; p < w.panels; ++p) multiply_panel(x, w, p, out + p * LANES, stride);
}

// sums (r rounded up to RANK_MULTIPLE, features rounded up to LANES) += ranksᵀ · rows, ranks packed by pack_ranks.
inline void outer_rows(const uint32_t* ranks, int64_t r, int64_t padded_r, int terms, const Rows& rows, int64_t features,
                       float* sums) {
  constexpr int WIDTH = 4;
  alignas(64) uint32_t panel[BLOCK_PAIRS * WIDTH * LANES];
  const int64_t stride = rounded_up(features, LANES);
  begin_products(BLOCK_PAIRS);
  int64_t f = 0;
  for (; f + WIDTH * LANES <= stride; f += WIDTH * LANES) {
    interleave_tokens(rows, f, WIDTH * LANES, panel);
    outer_tiles<WIDTH>(ranks, r, padded_r, terms, panel, sums + f, stride);
  }
  for (; f < stride; f += LANES) {
    interleave_tokens(rows, f, LANES, panel);
    outer_tiles<1>(ranks, r, padded_r, terms, panel, sums + f, stride);
  }
}

// Update (update.h) whose low-rank part is a product of pairs, finished by token; S's part is finished by feature and turned.
class PairsUpdate {
 public:
  PairsUpdate(const float* expand, int64_t row_stride, int64_t column_stride, int64_t r, int terms, float alpha,
              const Csr& sparse, int64_t in_features, int64_t out_features)
      : sparse_(nullptr, 0, 0, 0, 0.0f, sparse, in_features, out_features),
        expand_(expand, row_stride, column_stride, r ? out_features : 0, r, padded_pairs(r), terms),
        alpha_(alpha),
        out_features_(out_features) {}

  int64_t scratch_size() const { return sparse_.scratch_size(); }

  // rows (tokens, out_features) += the update; `in` packed feature-major where there is S; kept: of the output features.
  void add_to(uint16_t* rows, int64_t stride, int64_t tokens, const Rows& ranks, const float* in, TokenBits kept,
              float* scratch) const {
    alignas(64) float delta[TOKENS * LANES], tile[LANES * TOKENS];
    sparse_.multiply_whole_rows(in, scratch);
    begin_products(expand_.pairs);
    for (int64_t p = 0; p < expand_.panels; ++p) {
      const int64_t i = p * LANES, count = smaller(LANES, out_features_ - i);
      multiply_panel(ranks, expand_, p, delta, LANES);
      for (int64_t t = 0; t < TOKENS; ++t) {
        const Vec product = mul(broadcast(alpha_), load(delta + t * LANES));
        store(delta + t * LANES, kept.bits ? keep(kept.at(t, i), product) : product);
      }
      if (sparse_.has_sparse(i, count)) {
        std::memset(tile, 0, sizeof tile);
        sparse_.add_sparse_tile(i, count, in, scratch, tile);
        add_transposed(tile, TOKENS, LANES, delta, LANES);
      }
      for (int64_t t = 0; t < tokens; ++t) add_rounded(delta + t * LANES, count, rows + t * stride + i);
    }
  }

 private:
  // to[f] += delta[f] for count features of LANES, rounded once.
  static void add_rounded(const float* delta, int64_t count, uint16_t* to) {
    if (count == LANES) return store(to, add(load(to), load(delta)));
    uint16_t padded[LANES] = {};
    std::memcpy(padded, to, sizeof(uint16_t) * count);
    store(padded, add(load(padded), load(delta)));
    std::memcpy(to, padded, sizeof(uint16_t) * count);
  }

  Update sparse_;
  PackedPairs expand_;
  float alpha_;
  int64_t out_features_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
