// The low-rank products of a block of tokens from operands of bfloat16. It is included after bf16_dot_avx512.h or
// bf16_dot_amx.h.
#pragma once
#include "cpu/adapter/epilogue.h"
#include "cpu/sparse/spmm_bf16.h"

namespace rosa {
namespace ROSA_ISA {

// out (BLOCK_TOKENS, stride) = x · wᵀ, with w's rows padded to a multiple of LANES.
inline void multiply_rows(const Rows& x, const VnniMatrix& w, float* out, int64_t stride) {
  begin_products(w.pairs);
  for (int64_t p = 0; p < w.panels; ++p) multiply_panel(x, w, p, out + p * LANES, stride);
}

// sums (r rounded up to RANK_MULTIPLE, features rounded up to LANES) += Hᵀ · rows, H packed by pack_H.
inline void outer_rows(const uint32_t* H, int64_t r, int64_t padded_r, int terms, const Rows& rows, int64_t features,
                       float* sums) {
  constexpr int WIDTH = 4;
  alignas(64) uint32_t panel[BLOCK_PAIRS * WIDTH * LANES];
  const int64_t stride = rounded_up(features, LANES);
  begin_products(BLOCK_PAIRS);
  int64_t f = 0;
  for (; f + WIDTH * LANES <= stride; f += WIDTH * LANES) {
    interleave_tokens(rows, f, WIDTH * LANES, panel);
    outer_tiles<WIDTH>(H, r, padded_r, terms, panel, sums + f, stride);
  }
  for (; f < stride; f += LANES) {
    interleave_tokens(rows, f, LANES, panel);
    outer_tiles<1>(H, r, padded_r, terms, panel, sums + f, stride);
  }
}

// The base layer's weight, (rows, length) through its strides, packed where the kernels multiply by it too.
inline VnniMatrix packed_weight(const Matrix& weight, int64_t row_stride, int64_t column_stride, int64_t rows,
                                int64_t length) {
  const int64_t wanted = weight.data ? rows : 0;
  return {(const uint16_t*)weight.data, row_stride, column_stride, wanted, length, padded_pairs(length), 1};
}

// A block of tokens feature-major, as S multiplies it: in pairs of tokens or in fp32. packed_size counts floats.
inline int64_t packed_size(int64_t features) { return rounded_up(features, ROW_MULTIPLE) * BLOCK_TOKENS; }
inline void pack_for(const Csr& s, const Rows& rows, int64_t features, float* packed) {
  if (in_pairs(s)) return pack_token_pairs(rows, features, reinterpret_cast<uint32_t*>(packed));
  pack(rows.data, rows.stride, BLOCK_TOKENS, features, packed);
}

// The Epilogue of epilogue.h whose low-rank part, and the product by a fused weight, multiply pairs of bfloat16. S's
// part is computed feature by feature, then transposed and added.
class Bf16Epilogue {
 public:
  Bf16Epilogue(const float* expand, int64_t row_stride, int64_t column_stride, int64_t r, int terms, float alpha,
               const Csr& sparse, int64_t in_features, int64_t out_features, const FusedWeight& fused)
      : S_(sparse),
        sparse_(nullptr, 0, 0, 0, 0.0f, sparse, in_features, out_features),
        expand_(expand, row_stride, column_stride, r ? out_features : 0, r, padded_pairs(r), terms),
        fused_(fused),
        alpha_(alpha),
        out_features_(out_features) {}

  int64_t scratch_size() const { return sparse_.scratch_size(); }

  // Adds the adapter's part of x (tokens, in_features) to rows (tokens, out_features). `in` is x by pack_for where
  // there is S; `kept` are dropout's bits of the output features.
  void add_to(uint16_t* rows, int64_t stride, int64_t tokens, const Rows& H, const Rows& x, const float* in,
              TokenBits kept, float* scratch) const {
    alignas(64) float turned[BLOCK_TOKENS * WIDTH];
    OutputRows to = {rows, stride, tokens, 0, 0, alpha_, kept, fused_, nullptr};
    begin_products(expand_.pairs);
    sparse_.multiply_whole_rows(in, scratch);
    // Rows are visited one after the other. Where S or a fused weight comes, all tokens of the block are visited before
    // the next features: a tile of S is for all of them, and the weight's panels stay in the cache.
    const int64_t step = fused_.weight || sparse_.has_sparse(0, out_features_) ? BLOCK_TOKENS : EPILOGUE_TOKENS;
    for (int64_t first = 0; first < tokens; first += step)
      for (int64_t i = 0; i < out_features_; i += WIDTH) {
        to.first = i;
        to.count = smaller(WIDTH, out_features_ - i);
        to.extra = sparse_.has_sparse(i, to.count) ? turned : nullptr;
        if (to.extra) multiply_sparse(i, to.count, in, scratch, turned);
        for (int64_t t = first; t < smaller(first + step, tokens); t += EPILOGUE_TOKENS)
          add_products(H, expand_, x, i / LANES, t, to);
      }
  }

 private:
  static constexpr int64_t WIDTH = EPILOGUE_PANELS * LANES;

  // turned (BLOCK_TOKENS, WIDTH) = S's part of output features [i, i + count).
  void multiply_sparse(int64_t i, int64_t count, const float* in, const float* scratch, float* turned) const {
    if (in_pairs(S_)) return multiply_sparse_bf16(S_, i, count, reinterpret_cast<const uint32_t*>(in), turned, WIDTH);
    alignas(64) float tile[WIDTH * BLOCK_TOKENS] = {};
    std::memset(turned, 0, sizeof tile);
    sparse_.add_sparse_tile(i, count, in, scratch, tile);
    add_transposed(tile, BLOCK_TOKENS, WIDTH, turned, WIDTH);
  }

  Csr S_;
  Epilogue sparse_;
  VnniMatrix expand_;
  FusedWeight fused_;
  float alpha_;
  int64_t out_features_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
