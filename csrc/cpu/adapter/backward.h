// The adapter's backward: one sweep over x and dy gives dA, dB, dS and the adapter's part of dx.
#pragma once
#include "cpu/adapter/forward.h"
#include "cpu/adapter/grad_reduction.h"
#include "cpu/sparse/sddmm.h"

namespace rosa {
namespace ROSA_ISA {

// Sᵀ with its values in the order of S.
inline Csr transposed(const Backward& b) {
  const Structure s = b.sparse.structure;
  return {b.ccol, b.row, b.sparse.values, b.sparse.nnz,
          s == Structure::row      ? Structure::column
          : s == Structure::column ? Structure::row
                                   : s};
}

// Sᵀ with its values in the order of the CSC view.
class TransposedCsr {
 public:
  TransposedCsr(const Backward& b, bool wanted) : values_(wanted ? b.sparse.nnz : 0) {
    if (!wanted || !b.sparse.values) return;
    for (int64_t e = 0; e < b.sparse.nnz; ++e) values_[e] = b.sparse.values[b.permutation[e]];
    csr = transposed(b);
    csr.values = values_;
  }

  Csr csr;

 private:
  Buffer<float> values_;
};

template <class T>
class BackwardSweep {
 public:
  explicit BackwardSweep(const Backward& b)
      : b_(b),
        r_(b.low_rank.r),
        padded_r_(rounded_up(r_, GROUP)),
        padded_in_(rounded_up(b.in_features, LANES)),
        want_dx_(b.dx.data),
        want_dH_(r_ && (b.dA || want_dx_)),
        by_token_(want_dx_ && !r_ && BlockSparse::serves(transposed(b))),
        packs_x_(b.dB || (b.dA && b.dropout.on) || SparseGradient<T>::reads_packed(b)),
        packs_dy_(want_dH_ || SparseGradient<T>::reads_packed(b) || (want_dx_ && b.sparse.values && !by_token_)),
        alpha_(low_rank_scale(b.low_rank, b.dropout)),
        shrink_x_(b.dB ? padded_r_ * b.in_features : 0),
        shrink_dy_(want_dH_ ? padded_r_ * b.out_features : 0),
        block_sparse_(by_token_ ? transposed(b) : Csr{}, b.permutation, b.in_features, b.out_features),
        transposed_(b, want_dx_ && !by_token_),
        dx_epilogue_(b.low_rank.A, 1, b.in_features, want_dx_ ? r_ : 0, alpha_, transposed_.csr, b.out_features,
                     b.in_features),
        slots_(larger(1, slot_count(b.tokens))),
        sums_(b, slots_),
        dS_(b) {
    if (b.dB) pack_groups(b.low_rank.A, b.in_features, 1, r_, b.in_features, shrink_x_);
    if (want_dH_) pack_groups(b.low_rank.B, 1, r_, r_, b.out_features, shrink_dy_);
  }

  void run() const {
    for_slots(slots_, block_count(b_.tokens), [&](int64_t slot, int64_t begin, int64_t end) {
      const Scratch scratch = slot_scratch();
      for (int64_t block = begin; block < end; ++block) sweep_block(slot, block * BLOCK_TOKENS, scratch);
    });
    sums_.write(alpha_);
  }

 private:
  // Scratch memory: x and dy packed; H, then dH, feature-major and token-major; features of dy and x gathered for S;
  // dropout's bits, null without dropout.
  struct Scratch {
    float *x, *dy, *H, *turned, *gathered, *epilogue;
    uint64_t* bits;
  };

  Scratch slot_scratch() const {
    static thread_local Arena arena;
    float* piece[7];
    arena.cut(
        {packs_x_ ? padded_in_ * BLOCK_TOKENS : 0, packs_dy_ ? rounded_up(b_.out_features, LANES) * BLOCK_TOKENS : 0,
         padded_r_ * BLOCK_TOKENS, padded_r_ * BLOCK_TOKENS, larger(dS_.scratch_size(), block_sparse_.scratch_size()),
         dx_epilogue_.scratch_size(), b_.dropout.on ? 2 * (padded_in_ + GROUP) : 0},
        piece);
    uint64_t* bits = b_.dropout.on ? reinterpret_cast<uint64_t*>(piece[6]) : nullptr;
    if (bits) clear_elements(bits, padded_in_ + GROUP);
    return {piece[0], piece[1], piece[2], piece[3], piece[4], piece[5], bits};
  }

  void sweep_block(int64_t slot, int64_t first, const Scratch& s) const {
    const int64_t tokens = smaller(BLOCK_TOKENS, b_.tokens - first);
    const bool more = first + 2 * tokens <= b_.tokens;
    const T* x_rows = (const T*)b_.x.data + first * b_.x.stride;
    const T* dy_rows = (const T*)b_.dy.data + first * b_.dy.stride;
    if (packs_x_) pack(x_rows, b_.x.stride, tokens, b_.in_features, s.x);
    if (packs_dy_) pack(dy_rows, b_.dy.stride, tokens, b_.out_features, s.dy);
    if (s.bits) keep_bits(b_.dropout, first, b_.in_features, s.bits);
    const TokenBlock<T> x = {x_rows, b_.x.stride, tokens}, dy = {dy_rows, b_.dy.stride, tokens};
    const TokenBlock<T> x_dropped = s.bits ? TokenBlock<T>{nullptr, 0, BLOCK_TOKENS, s.x, s.bits} : x;
    if (b_.dvalues) dS_.add(sums_.dS(slot), x, dy, s.x, s.dy, s.gathered, more);
    if (b_.dB) {
      multiply(shrink_x_, s.x, s.bits, r_, b_.in_features, 1.0f, s.H);
      token_major(s.H, r_, s.turned);
      outer(s.turned, r_, dy, b_.out_features, sums_.dB(slot));
    }
    if (want_dH_) multiply(shrink_dy_, s.dy, nullptr, r_, b_.out_features, 1.0f, s.H);
    if (b_.dA) {
      token_major(s.H, r_, s.turned);
      outer(s.turned, r_, x_dropped, b_.in_features, sums_.dA(slot));
    }
    if (want_dx_) {
      T* dx_rows = (T*)b_.dx.data + first * b_.dx.stride;
      if (by_token_)
        add_block_sparse(dy_rows, dx_rows, tokens, b_.tokens - first, s.gathered);
      else
        dx_epilogue_.add_to(dx_rows, b_.dx.stride, tokens, s.H, s.dy, s.bits, s.epilogue);
    }
  }

  // dx_rows += dy_rows · S; what S needs of dy is copied first unless dS has copied it. `left` counts the tokens that
  // follow, too.
  void add_block_sparse(const T* dy_rows, T* dx_rows, int64_t tokens, int64_t left, float* gathered) const {
    const int64_t step = block_sparse_.tokens_at_a_time();
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t now = smaller(step, tokens - t);
      const bool more = t + 2 * now <= left;
      T* const rows = dx_rows + t * b_.dx.stride;
      if (dS_.fills_runs()) {
        block_sparse_.add_tiles(gathered + t * RUN, rows, b_.dx.stride, now, more, 0, block_sparse_.tile_count(), false,
                                run_tokens(tokens));
      } else {
        block_sparse_.gather(dy_rows + t * b_.dy.stride, b_.dy.stride, now, more, gathered);
        block_sparse_.add_tiles(gathered, rows, b_.dx.stride, now, more, 0, block_sparse_.tile_count());
      }
    }
  }

  const Backward& b_;
  const int64_t r_, padded_r_, padded_in_;
  const bool want_dx_, want_dH_, by_token_, packs_x_, packs_dy_;
  const float alpha_;
  Buffer<float> shrink_x_, shrink_dy_;
  const BlockSparse block_sparse_;
  const TransposedCsr transposed_;
  const Epilogue dx_epilogue_;
  const int64_t slots_;
  const GradReduction sums_;
  const SparseGradient<T> dS_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
