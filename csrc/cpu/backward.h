// The adapter's backward: one sweep over x and dy gives dA, dB, dS and the adapter's part of dx.
#pragma once
#include "forward.h"
#include "partial_sums.h"

namespace rosa {
namespace ROSA_ISA {

// Sᵀ with its values in the order of the CSC view.
class TransposedCsr {
 public:
  TransposedCsr(const Backward& b, bool wanted) : values_(wanted ? b.sparse.nnz : 0) {
    if (!wanted || !b.sparse.values) return;
    for (int64_t e = 0; e < b.sparse.nnz; ++e) values_[e] = b.sparse.values[b.permutation[e]];
    csr = {b.ccol, b.row, values_, b.sparse.nnz, transposed(b.sparse.structure)};
  }

  Csr csr;

 private:
  static Structure transposed(Structure s) {
    return s == Structure::row ? Structure::column : s == Structure::column ? Structure::row : s;
  }
  Buffer<float> values_;
};

// dS of one block; gathered and turned hold the touched features, TOKENS of each.
template <class T>
inline void add_dS(const Backward& b, const PartialSums& sums, int64_t slot, const int32_t* touched, const Block<T>& x,
                   const Block<T>& dy, float* gathered, float* turned) {
  const int64_t count = sums.touched_count;
  if (!count) return sample(b.sparse, b.out_features, dy.packed, x.packed, sums.dS(slot));
  const bool rows = b.sparse.structure == Structure::row;  // of dy; else columns, of x
  gather_rows(touched, count, rows ? dy.packed : x.packed, gathered);
  token_major(gathered, count, turned);
  outer(turned, count, rows ? x : dy, rows ? b.in_features : b.out_features, sums.dS(slot));
}

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
        want_x_(b.dA || b.dB || b.dvalues),
        alpha_(low_rank_scale(b.low_rank, b.dropout)),
        shrink_x_(b.dB ? padded_r_ * b.in_features : 0),
        shrink_dy_(want_dH_ ? padded_r_ * b.out_features : 0),
        transposed_(b, want_dx_),
        dx_update_(b.low_rank.A, 1, b.in_features, want_dx_ ? r_ : 0, alpha_, transposed_.csr, b.out_features,
                   b.in_features),
        slots_(larger(1, slot_count(b.tokens))),
        sums_(b, slots_),
        touched_(sums_.touched_count) {
    if (b.dB) pack_groups(b.low_rank.A, b.in_features, 1, r_, b.in_features, shrink_x_);
    if (want_dH_) pack_groups(b.low_rank.B, 1, r_, r_, b.out_features, shrink_dy_);
    if (sums_.touched_count) touched_features(b.sparse, b.out_features, sums_.touched_count, touched_);
  }

  void run() const {
    for_slots(slots_, block_count(b_.tokens), [&](int64_t slot, int64_t begin, int64_t end) {
      const Scratch scratch = slot_scratch();
      for (int64_t block = begin; block < end; ++block) sweep_block(slot, block * TOKENS, scratch);
    });
    sums_.write(alpha_);
  }

 private:
  // x and dy packed; ranks feature-major and token-major; dropout's bits, null without dropout.
  struct Scratch {
    float *x, *dy, *ranks, *turned, *update;
    uint64_t* bits;
  };

  Scratch slot_scratch() const {
    static thread_local Arena arena;
    const int64_t most_ranks = larger(padded_r_, rounded_up(sums_.touched_count, GROUP));
    float* piece[6];
    arena.cut({padded_in_ * TOKENS, rounded_up(b_.out_features, LANES) * TOKENS, most_ranks * TOKENS,
               most_ranks * TOKENS, dx_update_.scratch_size(), b_.dropout.on ? 2 * (padded_in_ + GROUP) : 0},
              piece);
    uint64_t* bits = b_.dropout.on ? reinterpret_cast<uint64_t*>(piece[5]) : nullptr;
    if (bits) std::memset(bits, 0, sizeof(uint64_t) * (padded_in_ + GROUP));
    return {piece[0], piece[1], piece[2], piece[3], piece[4], bits};
  }

  void sweep_block(int64_t slot, int64_t first, const Scratch& s) const {
    const int64_t tokens = smaller(TOKENS, b_.tokens - first);
    const T* x_rows = (const T*)b_.x.data + first * b_.x.stride;
    const T* dy_rows = (const T*)b_.dy.data + first * b_.dy.stride;
    if (want_x_) pack(x_rows, b_.x.stride, tokens, b_.in_features, s.x);
    pack(dy_rows, b_.dy.stride, tokens, b_.out_features, s.dy);
    if (s.bits) keep_bits(b_.dropout, first, b_.in_features, s.bits);
    const bool whole = tokens == TOKENS;
    const Block<T> x = {whole ? x_rows : nullptr, b_.x.stride, s.x, nullptr};
    const Block<T> x_dropped = s.bits ? Block<T>{nullptr, 0, s.x, s.bits} : x;
    const Block<T> dy = {whole ? dy_rows : nullptr, b_.dy.stride, s.dy, nullptr};
    if (b_.dvalues) add_dS(b_, sums_, slot, touched_, x, dy, s.ranks, s.turned);
    if (b_.dB) {
      multiply(shrink_x_, s.x, s.bits, r_, b_.in_features, 1.0f, s.ranks);  // H
      token_major(s.ranks, r_, s.turned);
      outer(s.turned, r_, dy, b_.out_features, sums_.dB(slot));
    }
    if (want_dH_) multiply(shrink_dy_, s.dy, nullptr, r_, b_.out_features, 1.0f, s.ranks);
    if (b_.dA) {
      token_major(s.ranks, r_, s.turned);
      outer(s.turned, r_, x_dropped, b_.in_features, sums_.dA(slot));
    }
    if (want_dx_) {
      T* dx_rows = (T*)b_.dx.data + first * b_.dx.stride;
      dx_update_.add_to(dx_rows, b_.dx.stride, tokens, s.ranks, s.dy, s.bits, s.update);
    }
  }

  const Backward& b_;
  const int64_t r_, padded_r_, padded_in_;
  const bool want_dx_, want_dH_, want_x_;
  const float alpha_;
  Buffer<float> shrink_x_, shrink_dy_;
  const TransposedCsr transposed_;
  const Update dx_update_;
  const int64_t slots_;
  const PartialSums sums_;
  Buffer<int32_t> touched_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
