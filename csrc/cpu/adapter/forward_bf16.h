// The adapter's forward for bfloat16 x and r > 0, and the whole layer's where a weight comes too. Its dense products
// use instructions for bfloat16.
#pragma once
#include "cpu/adapter/epilogue_bf16.h"
#include "cpu/adapter/forward.h"

namespace rosa {
namespace ROSA_ISA {

// Floats that block_rows needs for its copy.
inline int64_t copied_rows(int64_t features) { return BLOCK_TOKENS * rounded_up(features, ROW_MULTIPLE) / 2; }

// Memory for H or dH, as floats (BLOCK_TOKENS, padded_r) and rounded (BLOCK_TOKENS, up to a multiple of ROW_MULTIPLE).
struct RoundedH {
  float* values;
  uint16_t* rounded;
  int64_t r, padded_r, rounded_stride;

  static int64_t values_size(int64_t r) { return BLOCK_TOKENS * rounded_up(r, LANES); }
  static int64_t rounded_size(int64_t r) { return BLOCK_TOKENS * rounded_up(r, ROW_MULTIPLE) / 2; }
  RoundedH(float* values, float* rounded, int64_t r)
      : values(values),
        rounded(reinterpret_cast<uint16_t*>(rounded)),
        r(r),
        padded_r(rounded_up(r, LANES)),
        rounded_stride(rounded_up(r, ROW_MULTIPLE)) {
    clear_elements(rounded, rounded_size(r));
  }
  Rows round() const { return round_H(values, r, padded_r, rounded, rounded_stride); }
};

inline void forward_bf16(const Forward& f) {
  const int64_t r = f.low_rank.r, in = f.in_features;
  const TermCounts terms = term_counts(f.low_rank);
  const VnniMatrix shrink(f.low_rank.A, in, 1, r, in, padded_pairs(in), terms.exact, lanes_a_row(r));
  const VnniMatrix weight = packed_weight(f.weight, f.weight.stride, 1, f.out_features, in);
  const Bf16Epilogue epilogue(f.low_rank.B, r, 1, r, terms.rounded, low_rank_scale(f.low_rank, f.dropout), f.sparse, in,
                              f.out_features, {f.weight.data ? &weight : nullptr, (const uint16_t*)f.bias});
  for_slots(slot_count(f.tokens), block_count(f.tokens), [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* piece[7];
    arena.cut(
        {f.sparse.values ? packed_size(in) : 0, copied_rows(in), RoundedH::values_size(r), RoundedH::rounded_size(r),
         epilogue.scratch_size(), f.dropout.on ? 2 * bit_words(in) : 0, f.dropout.on ? copied_rows(in) : 0},
        piece);
    const RoundedH H(piece[2], piece[3], r);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * BLOCK_TOKENS, tokens = smaller(BLOCK_TOKENS, f.tokens - first);
      const uint16_t* x_rows = (const uint16_t*)f.x.data + first * f.x.stride;
      const TokenBits kept = block_bits(f.dropout, first, in, reinterpret_cast<uint64_t*>(piece[5]));
      const Rows x = block_rows(x_rows, f.x.stride, tokens, in, {nullptr}, reinterpret_cast<uint16_t*>(piece[1]));
      const Rows kept_x =
          kept.bits ? block_rows(x_rows, f.x.stride, tokens, in, kept, reinterpret_cast<uint16_t*>(piece[6])) : x;
      if (f.sparse.values) pack_for(f.sparse, x, in, piece[0]);
      multiply_rows(kept_x, shrink, H.values, H.padded_r);
      epilogue.add_to((uint16_t*)f.y.data + first * f.y.stride, f.y.stride, tokens, H.round(), x, piece[0], {nullptr},
                      piece[4]);
    }
    end_products();
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
