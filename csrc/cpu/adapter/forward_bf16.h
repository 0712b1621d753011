// The adapter's forward for bfloat16 x and r > 0, with a weight the whole layer's: its dense products by instructions
// for bfloat16.
#pragma once
#include "cpu/adapter/epilogue_bf16.h"
#include "cpu/adapter/forward.h"

namespace rosa {
namespace ROSA_ISA {

inline int64_t copied_rows(int64_t features) { return TOKENS * rounded_up(features, ROW_MULTIPLE) / 2; }  // in floats

// Memory for H or dH, as floats (TOKENS, padded_r) and rounded (TOKENS, up to a multiple of ROW_MULTIPLE).
struct RankBlock {
  float* values;
  uint16_t* rounded;
  int64_t r, padded_r, rounded_stride;

  static int64_t values_size(int64_t r) { return TOKENS * rounded_up(r, LANES); }
  static int64_t rounded_size(int64_t r) { return TOKENS * rounded_up(r, ROW_MULTIPLE) / 2; }
  RankBlock(float* values, float* rounded, int64_t r)
      : values(values),
        rounded(reinterpret_cast<uint16_t*>(rounded)),
        r(r),
        padded_r(rounded_up(r, LANES)),
        rounded_stride(rounded_up(r, ROW_MULTIPLE)) {
    std::memset(rounded, 0, sizeof(float) * rounded_size(r));
  }
  Rows round() const { return round_ranks(values, r, padded_r, rounded, rounded_stride); }
};

inline void forward_pairs(const Forward& f) {
  const int64_t r = f.low_rank.r, in = f.in_features;
  const WordCounts words = word_counts(f.low_rank);
  const PackedPairs shrink(f.low_rank.A, in, 1, r, in, padded_pairs(in), words.exact, lanes_a_row(r));
  const PackedPairs weight = packed_base(f.weight, f.weight.stride, 1, f.out_features, in);
  const PairsUpdate update(f.low_rank.B, r, 1, r, words.rounded, low_rank_scale(f.low_rank, f.dropout), f.sparse, in,
                           f.out_features, {f.weight.data ? &weight : nullptr, (const uint16_t*)f.bias});
  for_slots(slot_count(f.tokens), block_count(f.tokens), [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* piece[7];
    arena.cut(
        {f.sparse.values ? packed_size(in) : 0, copied_rows(in), RankBlock::values_size(r), RankBlock::rounded_size(r),
         update.scratch_size(), f.dropout.on ? 2 * bit_words(in) : 0, f.dropout.on ? copied_rows(in) : 0},
        piece);
    const RankBlock ranks(piece[2], piece[3], r);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * TOKENS, tokens = smaller(TOKENS, f.tokens - first);
      const uint16_t* x_rows = (const uint16_t*)f.x.data + first * f.x.stride;
      const TokenBits kept = block_bits(f.dropout, first, in, reinterpret_cast<uint64_t*>(piece[5]));
      const Rows x = block_rows(x_rows, f.x.stride, tokens, in, {nullptr}, reinterpret_cast<uint16_t*>(piece[1]));
      const Rows kept_x =
          kept.bits ? block_rows(x_rows, f.x.stride, tokens, in, kept, reinterpret_cast<uint16_t*>(piece[6])) : x;
      if (f.sparse.values) pack_for(f.sparse, x, in, piece[0]);
      multiply_rows(kept_x, shrink, ranks.values, ranks.padded_r);
      update.add_to((uint16_t*)f.y.data + first * f.y.stride, f.y.stride, tokens, ranks.round(), x, piece[0], {nullptr},
                    piece[4]);
    }
    end_products();
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
