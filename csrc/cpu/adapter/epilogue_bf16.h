// The low-rank products of a block of tokens from operands of bfloat16. Included after pair_products.h or
// tile_products.h.
#pragma once
#include "cpu/adapter/epilogue.h"
#include "cpu/sparse/spmm_bf16.h"

namespace rosa {
namespace ROSA_ISA {

// out (TOKENS, stride) = x · wᵀ, with w's rows padded to a multiple of LANES.
inline void multiply_rows(const Rows& x, const PackedPairs& w, float* out, int64_t stride) {
  begin_products(w.pairs);
  for (int64_t p = 0; p < w.panels; ++p) multiply_panel(x, w, p, out + p * LANES, stride);
}

// sums (r rounded up to RANK_MULTIPLE, features rounded up to LANES) += ranksᵀ · rows, ranks packed by pack_ranks.
inline void outer_rows(const uint32_t* ranks, int64_t r, int64_t padded_r, int words, const Rows& rows,
                       int64_t features, float* sums) {
  constexpr int WIDTH = 4;
  alignas(64) uint32_t panel[BLOCK_PAIRS * WIDTH * LANES];
  const int64_t stride = rounded_up(features, LANES);
  begin_products(BLOCK_PAIRS);
  int64_t f = 0;
  for (; f + WIDTH * LANES <= stride; f += WIDTH * LANES) {
    interleave_tokens(rows, f, WIDTH * LANES, panel);
    outer_tiles<WIDTH>(ranks, r, padded_r, words, panel, sums + f, stride);
  }
  for (; f < stride; f += LANES) {
    interleave_tokens(rows, f, LANES, panel);
    outer_tiles<1>(ranks, r, padded_r, words, panel, sums + f, stride);
  }
}

// A weight of the base layer, where the kernels multiply it too: (rows, length) through its strides.
inline PackedPairs packed_base(const Matrix& weight, int64_t row_stride, int64_t column_stride, int64_t rows,
                               int64_t length) {
  const int64_t wanted = weight.data ? rows : 0;
  return {(const uint16_t*)weight.data, row_stride, column_stride, wanted, length, padded_pairs(length), 1};
}

// Floats of memory for a block of tokens feature-major, as S multiplies it, and filling it: in pairs of tokens or in
// fp32.
inline int64_t packed_size(int64_t features) { return rounded_up(features, ROW_MULTIPLE) * TOKENS; }
inline void pack_for(const Csr& s, const Rows& rows, int64_t features, float* packed) {
  if (in_pairs(s)) return pack_token_pairs(rows, features, reinterpret_cast<uint32_t*>(packed));
  pack(rows.data, rows.stride, TOKENS, features, packed);
}

// Update (update.h) whose low-rank part is a product of pairs, and with a base all of the rows. S's part, finished by
// feature, is turned and joins it.
class PairsUpdate {
 public:
  PairsUpdate(const float* expand, int64_t row_stride, int64_t column_stride, int64_t r, int words, float alpha,
              const Csr& sparse, int64_t in_features, int64_t out_features, const Base& base)
      : S_(sparse),
        sparse_(nullptr, 0, 0, 0, 0.0f, sparse, in_features, out_features),
        expand_(expand, row_stride, column_stride, r ? out_features : 0, r, padded_pairs(r), words),
        base_(base),
        alpha_(alpha),
        out_features_(out_features) {}

  int64_t scratch_size() const { return sparse_.scratch_size(); }

  // rows (tokens, out_features) get the update of x (tokens, in_features); `in` is x by pack_for where there is S;
  // kept: of the output features.
  void add_to(uint16_t* rows, int64_t stride, int64_t tokens, const Rows& ranks, const Rows& x, const float* in,
              TokenBits kept, float* scratch) const {
    alignas(64) float turned[TOKENS * WIDTH];
    Target to = {rows, stride, tokens, 0, 0, alpha_, kept, base_, nullptr};
    begin_products(expand_.pairs);
    sparse_.multiply_whole_rows(in, scratch);
    // Rows are visited one after the other, but where S comes, whose tiles are of all the block's tokens, or a base,
    // whose panels stay in cache for them.
    const int64_t step = base_.weight || sparse_.has_sparse(0, out_features_) ? TOKENS : UPDATE_TOKENS;
    for (int64_t first = 0; first < tokens; first += step)
      for (int64_t i = 0; i < out_features_; i += WIDTH) {
        to.first = i;
        to.count = smaller(WIDTH, out_features_ - i);
        to.extra = sparse_.has_sparse(i, to.count) ? turned : nullptr;
        if (to.extra) multiply_sparse(i, to.count, in, scratch, turned);
        for (int64_t t = first; t < smaller(first + step, tokens); t += UPDATE_TOKENS)
          add_products(ranks, expand_, x, i / LANES, t, to);
      }
  }

 private:
  static constexpr int64_t WIDTH = UPDATE_PANELS * LANES;

  // turned (TOKENS, WIDTH) = S's part of output features [i, i + count).
  void multiply_sparse(int64_t i, int64_t count, const float* in, const float* scratch, float* turned) const {
    if (in_pairs(S_)) return multiply_sparse_pairs(S_, i, count, reinterpret_cast<const uint32_t*>(in), turned, WIDTH);
    alignas(64) float tile[WIDTH * TOKENS] = {};
    std::memset(turned, 0, sizeof tile);
    sparse_.add_sparse_tile(i, count, in, scratch, tile);
    add_transposed(tile, TOKENS, WIDTH, turned, WIDTH);
  }

  Csr S_;
  Update sparse_;
  PackedPairs expand_;
  Base base_;
  float alpha_;
  int64_t out_features_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
