// The sums of the adapter's gradients: each slot has its own, and they are added in a fixed order at the end.
#pragma once
#include "cpu/sparse/row_sparse.h"

namespace rosa {
namespace ROSA_ISA {

// A slot's sums are dA as (r, in), dB transposed as (r, out), and dS as one (count, length) matrix for whole rows or
// columns and as (nnz,) otherwise. r is rounded up to rank_multiple, count to GROUP, and in, out and length to LANES.
class GradReduction {
 public:
  GradReduction(const Backward& b, int64_t slots, int64_t rank_multiple = GROUP)
      : b_(b), slots_(slots), touched_count_(touched_count(b)) {
    const int64_t in = rounded_up(b.in_features, LANES), out = rounded_up(b.out_features, LANES);
    const int64_t padded_r = rounded_up(b.low_rank.r, rank_multiple);
    if (touched_count_) dS_stride_ = b.sparse.structure == Structure::row ? in : out;
    dA_size_ = b.dA ? padded_r * in : 0;
    dB_size_ = b.dB ? padded_r * out : 0;
    const int64_t dS_size = touched_count_ ? rounded_up(touched_count_, GROUP) * dS_stride_
                            : b.dvalues    ? b.sparse.nnz
                                           : 0;
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

 private:
  void write_dvalues() const {
    const float* sums = dS(0);
    if (!touched_count_) {
      std::memcpy(b_.dvalues, sums, sizeof(float) * b_.sparse.nnz);
    } else if (b_.sparse.structure == Structure::row) {
      for (int64_t n = 0; n < touched_count_; ++n)
        std::memcpy(b_.dvalues + n * b_.in_features, sums + n * dS_stride_, sizeof(float) * b_.in_features);
    } else {
      for (int64_t i = 0; i < b_.out_features; ++i)
        for (int64_t n = 0; n < touched_count_; ++n) b_.dvalues[i * touched_count_ + n] = sums[n * dS_stride_ + i];
    }
  }

  const Backward& b_;
  int64_t slots_, touched_count_, dA_size_, dB_size_, dS_stride_ = 0, slot_size_;
  Buffer<float> sums_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
