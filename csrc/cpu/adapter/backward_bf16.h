// The adapter's backward for bfloat16 x and dy and r > 0, and all of dx where a weight comes too. Its dense products
// use instructions for bfloat16.
#pragma once
#include "cpu/adapter/backward.h"
#include "cpu/adapter/forward_bf16.h"

namespace rosa {
namespace ROSA_ISA {

class BackwardBf16 {
 public:
  explicit BackwardBf16(const Backward& b)
      : b_(b),
        r_(b.low_rank.r),
        padded_r_(rounded_up(r_, LANES)),
        terms_(term_counts(b.low_rank)),
        want_dH_(b.dA || b.dx.data),
        packs_x_(SparseGradient<uint16_t>::reads_packed(b)),
        packs_dy_(packs_x_ || (b.dx.data && b.sparse.values)),
        alpha_(low_rank_scale(b.low_rank, b.dropout)),
        shrink_x_(b.low_rank.A, b.in_features, 1, b.dB ? r_ : 0, b.in_features, padded_pairs(b.in_features),
                  terms_.exact, lanes_a_row(r_)),
        shrink_dy_(b.low_rank.B, 1, r_, want_dH_ ? r_ : 0, b.out_features, padded_pairs(b.out_features), terms_.exact,
                   lanes_a_row(r_)),
        transposed_(b, b.dx.data),
        weight_(packed_weight(b.weight, 1, b.weight.stride, b.in_features, b.out_features)),
        dx_epilogue_(b.low_rank.A, 1, b.in_features, b.dx.data ? r_ : 0, terms_.rounded, alpha_, transposed_.csr,
                     b.out_features, b.in_features, {b.weight.data ? &weight_ : nullptr, nullptr}),
        slots_(larger(1, slot_count(b.tokens))),
        sums_(b, slots_, RANK_MULTIPLE),
        dS_(b) {}

  void run() const {
    for_slots(slots_, block_count(b_.tokens), [&](int64_t slot, int64_t begin, int64_t end) {
      const Scratch scratch = slot_scratch();
      for (int64_t block = begin; block < end; ++block) sweep_block(slot, block * BLOCK_TOKENS, scratch);
      end_products();
    });
    sums_.write(alpha_);
  }

 private:
  // Scratch memory: x and dy packed for S, and as rows, those of x also as dropout leaves them; H and dH; features
  // gathered for dS; dropout's bits.
  struct Scratch {
    float *x, *dy;
    uint16_t *x_rows, *kept_x_rows, *dy_rows;
    float* H;
    RoundedH dH;
    uint32_t* H_pairs;
    float *gathered, *epilogue;
    uint64_t* bits;
  };

  Scratch slot_scratch() const {
    static thread_local Arena arena;
    float* piece[12];
    arena.cut({packs_x_ ? packed_size(b_.in_features) : 0, packs_dy_ ? packed_size(b_.out_features) : 0,
               copied_rows(b_.in_features), b_.dropout.on ? copied_rows(b_.in_features) : 0,
               copied_rows(b_.out_features), RoundedH::values_size(r_), RoundedH::values_size(r_),
               RoundedH::rounded_size(r_), terms_.exact * BLOCK_PAIRS * padded_r_, dS_.scratch_size(),
               dx_epilogue_.scratch_size(), b_.dropout.on ? 2 * bit_words(b_.in_features) : 0},
              piece);
    return {piece[0],
            piece[1],
            reinterpret_cast<uint16_t*>(piece[2]),
            reinterpret_cast<uint16_t*>(piece[3]),
            reinterpret_cast<uint16_t*>(piece[4]),
            piece[5],
            RoundedH(piece[6], piece[7], r_),
            reinterpret_cast<uint32_t*>(piece[8]),
            piece[9],
            piece[10],
            reinterpret_cast<uint64_t*>(piece[11])};
  }

  void sweep_block(int64_t slot, int64_t first, const Scratch& s) const {
    const int64_t tokens = smaller(BLOCK_TOKENS, b_.tokens - first);
    const uint16_t* x_data = (const uint16_t*)b_.x.data + first * b_.x.stride;
    const uint16_t* dy_data = (const uint16_t*)b_.dy.data + first * b_.dy.stride;
    const Rows x = packs_x_ || b_.dA || b_.dB
                       ? block_rows(x_data, b_.x.stride, tokens, b_.in_features, {nullptr}, s.x_rows)
                       : Rows{};
    const Rows dy = block_rows(dy_data, b_.dy.stride, tokens, b_.out_features, {nullptr}, s.dy_rows);
    if (packs_x_) pack_for(b_.sparse, x, b_.in_features, s.x);
    if (packs_dy_) pack_for(b_.sparse, dy, b_.out_features, s.dy);
    if (b_.dvalues && in_pairs(b_.sparse)) {
      sample_bf16(b_.sparse, b_.out_features, reinterpret_cast<uint32_t*>(s.dy), reinterpret_cast<uint32_t*>(s.x),
                  sums_.dS(slot));
    } else if (b_.dvalues) {
      const TokenBlock<uint16_t> x_block = {x_data, b_.x.stride, tokens}, dy_block = {dy_data, b_.dy.stride, tokens};
      dS_.add(sums_.dS(slot), x_block, dy_block, s.x, s.dy, s.gathered, first + 2 * BLOCK_TOKENS <= b_.tokens);
    }
    const TokenBits kept = block_bits(b_.dropout, first, b_.in_features, s.bits);
    const Rows kept_x = kept.bits && (b_.dA || b_.dB)
                            ? block_rows(x_data, b_.x.stride, tokens, b_.in_features, kept, s.kept_x_rows)
                            : x;
    // Both products come first, because the processor foresees the rows that they read.
    if (b_.dB) multiply_rows(kept_x, shrink_x_, s.H, padded_r_);
    if (want_dH_) multiply_rows(dy, shrink_dy_, s.dH.values, padded_r_);
    if (b_.dB) add_outer_rows(s.H, s.H_pairs, dy, b_.out_features, sums_.dB(slot));
    if (b_.dA) add_outer_rows(s.dH.values, s.H_pairs, kept_x, b_.in_features, sums_.dA(slot));
    if (b_.dx.data) {
      uint16_t* dx = (uint16_t*)b_.dx.data + first * b_.dx.stride;
      dx_epilogue_.add_to(dx, b_.dx.stride, tokens, s.dH.round(), dy, s.dy, kept, s.epilogue);
    }
  }

  void add_outer_rows(const float* H, uint32_t* H_pairs, const Rows& rows, int64_t features, float* sums) const {
    pack_H(H, padded_r_, terms_.exact, H_pairs);
    outer_rows(H_pairs, r_, padded_r_, terms_.exact, rows, features, sums);
  }

  const Backward& b_;
  const int64_t r_, padded_r_;
  const TermCounts terms_;
  const bool want_dH_, packs_x_, packs_dy_;
  const float alpha_;
  const VnniMatrix shrink_x_, shrink_dy_;
  const TransposedCsr transposed_;
  const VnniMatrix weight_;
  const Bf16Epilogue dx_epilogue_;
  const int64_t slots_;
  const GradReduction sums_;
  const SparseGradient<uint16_t> dS_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
