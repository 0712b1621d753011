// The adapter's backward: one sweep over x and dy gives dA, dB, dS and the adapter's part of dx.
#pragma once
#include "forward.h"

namespace rosa {
namespace ROSA_ISA {

// Gradient sums of each slot: dA as (r, in), dB transposed as (r, out), dS as one (count, length) matrix for whole rows or
// columns and as (nnz,) otherwise; r and count rounded up to GROUP, in, out and length to LANES.
class PartialSums {
 public:
  PartialSums(const Backward& b, int64_t slots) : b_(b), slots_(slots) {
    const int64_t in = rounded_up(b.in_features, LANES), out = rounded_up(b.out_features, LANES);
    const int64_t padded_r = rounded_up(b.low_rank.r, GROUP);
    const bool rows = b.sparse.structure == Structure::row, columns = b.sparse.structure == Structure::column;
    if (b.dvalues && (rows || columns)) {
      touched_count = b.sparse.nnz / (rows ? b.in_features : b.out_features);
      dS_stride_ = rows ? in : out;
    }
    dA_size_ = b.dA ? padded_r * in : 0;
    dB_size_ = b.dB ? padded_r * out : 0;
    const int64_t dS_size = touched_count ? rounded_up(touched_count, GROUP) * dS_stride_ : b.dvalues ? b.sparse.nnz : 0;
    slot_size_ = dA_size_ + dB_size_ + rounded_up(dS_size, 16);
    sums_ = Buffer<float>(slots * slot_size_);
    std::memset(sums_, 0, sizeof(float) * slots * slot_size_);
  }

  float* dA(int64_t slot) const { return sums_ + slot * slot_size_; }
  float* dB(int64_t slot) const { return dA(slot) + dA_size_; }
  float* dS(int64_t slot) const { return dB(slot) + dB_size_; }

  // Adds the slots in their order and writes the gradients.
  void write(float alpha) const {
    float* total = dA(0);
    for_slots(slots_, slot_size_, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t slot = 1; slot < slots_; ++slot) {
        const float* other = dA(slot);
        for (int64_t i = begin; i < end; ++i) total[i] += other[i];
      }
    });
    const int64_t r = b_.low_rank.r, in = b_.in_features, out = b_.out_features;
    const int64_t in_stride = rounded_up(in, LANES), out_stride = rounded_up(out, LANES);
    for (int64_t q = 0; b_.dA && q < r; ++q)
      for (int64_t k = 0; k < in; ++k) b_.dA[q * in + k] = alpha * dA(0)[q * in_stride + k];
    for (int64_t i = 0; b_.dB && i < out; ++i)
      for (int64_t q = 0; q < r; ++q) b_.dB[i * r + q] = alpha * dB(0)[q * out_stride + i];
    if (b_.dvalues) write_dvalues();
  }

  int64_t touched_count = 0;  // whole rows or columns of the pattern

 private:
  void write_dvalues() const {
    const float* sums = dS(0);
    if (!touched_count) {
      std::memcpy(b_.dvalues, sums, sizeof(float) * b_.sparse.nnz);
    } else if (b_.sparse.structure == Structure::row) {
      for (int64_t n = 0; n < touched_count; ++n)
        std::memcpy(b_.dvalues + n * b_.in_features, sums + n * dS_stride_, sizeof(float) * b_.in_features);
    } else {
      for (int64_t i = 0; i < b_.out_features; ++i)
        for (int64_t n = 0; n < touched_count; ++n) b_.dvalues[i * touched_count + n] = sums[n * dS_stride_ + i];
    }
  }

  const Backward& b_;
  int64_t slots_, dA_size_, dB_size_, dS_stride_ = 0, slot_size_;
  Buffer<float> sums_;
};

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

inline const float* direct_rows(const float* rows, int64_t tokens) { return tokens == TOKENS ? rows : nullptr; }
inline const float* direct_rows(const uint16_t*, int64_t) { return nullptr; }

template <class T>
void backward_blocks(const Backward& b) {
  const int64_t r = b.low_rank.r, padded_r = rounded_up(r, GROUP);
  const int64_t padded_in = rounded_up(b.in_features, LANES), padded_out = rounded_up(b.out_features, LANES);
  const bool want_dx = b.dx.data, want_dH = r && (b.dA || want_dx), want_H = b.dB;
  const bool want_x = b.dA || want_H || b.dvalues;
  const float alpha = low_rank_scale(b.low_rank, b.dropout);
  Buffer<float> shrink_x(want_H ? padded_r * b.in_features : 0), shrink_dy(want_dH ? padded_r * b.out_features : 0);
  if (want_H) pack_groups(b.low_rank.A, b.in_features, 1, r, b.in_features, shrink_x);
  if (want_dH) pack_groups(b.low_rank.B, 1, r, r, b.out_features, shrink_dy);
  const TransposedCsr transposed(b, want_dx);
  const Update update(b.low_rank.A, 1, b.in_features, want_dx ? r : 0, alpha, transposed.csr, b.out_features,
                      b.in_features);
  const int64_t slots = larger(1, slot_count(b.tokens));
  const PartialSums sums(b, slots);
  const int64_t touched_count = sums.touched_count;
  const bool touches_rows = b.sparse.structure == Structure::row;
  Buffer<int32_t> touched(touched_count);
  if (touched_count) touched_features(b.sparse, b.out_features, touched_count, touched);
  const int64_t most_ranks = larger(padded_r, rounded_up(touched_count, GROUP));
  for_slots(slots, block_count(b.tokens), [&](int64_t slot, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* piece[6];
    arena.cut({padded_in * TOKENS, padded_out * TOKENS, most_ranks * TOKENS, most_ranks * TOKENS, update.scratch_size(),
               b.dropout.on ? 2 * (padded_in + 4) : 0},
              piece);
    float *x = piece[0], *dy = piece[1], *ranks = piece[2], *turned = piece[3], *scratch = piece[4];
    uint64_t* bits = b.dropout.on ? reinterpret_cast<uint64_t*>(piece[5]) : nullptr;
    if (bits) std::memset(bits, 0, sizeof(uint64_t) * (padded_in + 4));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * TOKENS, tokens = smaller(TOKENS, b.tokens - first);
      const T* x_rows = (const T*)b.x.data + first * b.x.stride;
      const T* dy_rows = (const T*)b.dy.data + first * b.dy.stride;
      if (want_x) pack(x_rows, b.x.stride, tokens, b.in_features, x);
      pack(dy_rows, b.dy.stride, tokens, b.out_features, dy);
      if (bits) keep_bits(b.dropout, first, b.in_features, bits);
      const Block x_block = {direct_rows(x_rows, tokens), b.x.stride, x, nullptr};
      const Block x_dropped = bits ? Block{nullptr, 0, x, bits} : x_block;
      const Block dy_block = {direct_rows(dy_rows, tokens), b.dy.stride, dy, nullptr};
      if (touched_count) {
        gather_rows(touched, touched_count, touches_rows ? dy : x, ranks);
        token_major(ranks, touched_count, turned);
        outer(turned, touched_count, touches_rows ? x_block : dy_block, touches_rows ? b.in_features : b.out_features,
              sums.dS(slot));
      } else if (b.dvalues) {
        sample(b.sparse, b.out_features, dy, x, sums.dS(slot));
      }
      if (want_H) {
        multiply(shrink_x, x, bits, r, b.in_features, 1.0f, ranks);
        token_major(ranks, r, turned);
        outer(turned, r, dy_block, b.out_features, sums.dB(slot));
      }
      if (want_dH) multiply(shrink_dy, dy, nullptr, r, b.out_features, 1.0f, ranks);
      if (b.dA) {
        token_major(ranks, r, turned);
        outer(turned, r, x_dropped, b.in_features, sums.dA(slot));
      }
      if (want_dx)
        update.add_to((T*)b.dx.data + first * b.dx.stride, b.dx.stride, tokens, ranks, dy, bits, scratch);
    }
  });
  sums.write(alpha);
}

}  // namespace ROSA_ISA
}  // namespace rosa
