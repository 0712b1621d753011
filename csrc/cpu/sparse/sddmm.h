// dS of a block of tokens: by dense products for rows, columns and blocks of 16, and entry by entry for other patterns.
#pragma once
#include "cpu/sparse/block_sparse.h"
#include "cpu/sparse/row_sparse.h"
#include "cpu/sparse/spmm.h"

namespace rosa {
namespace ROSA_ISA {

// dvalues += dyᵀ x at the entries of S, made of blocks of 16, from the runs of dy and x.
inline void sample_blocks(const Csr& s, int64_t out_features, const float* dy, const float* x, int64_t tokens,
                          float* dvalues) {
  const int64_t apart = run_tokens(tokens);
  for (int64_t i = 0; i < out_features; i += RUN) {
    const int64_t length = s.crow[i + 1] - s.crow[i], rows = smaller(RUN, out_features - i);
    for (int64_t n = 0; n < length; n += RUN) {
      const float* run = x + s.col[s.crow[i] + n] * apart;
      float* out = dvalues + s.crow[i] + n;
      const int64_t width = smaller(RUN, length - n);
      const bool whole = rows == RUN && width == RUN;
      float sums[RUN * RUN];
      if (!whole) std::memset(sums, 0, sizeof sums);
      outer_panel<STRIP * GROUP>(dy + i * apart, RUN, RUN, run, RUN, tokens, RUN, whole ? out : sums,
                                 whole ? length : RUN);
      for (int64_t j = 0; !whole && j < rows; ++j)
        for (int64_t c = 0; c < width; ++c) out[j * length + c] += sums[j * RUN + c];
    }
  }
}

template <class T>
class SparseGradient {
 public:
  explicit SparseGradient(const Backward& b)
      : b_(b),
        blocks_(b.dvalues && b.sparse.structure == Structure::block16),
        rows_(b.sparse.structure == Structure::row),
        x_starts_(Starts::of_columns(b.sparse, blocks_ ? b.out_features : 0, b.in_features)),
        dy_starts_(Starts::of_rows(b.sparse, blocks_ ? b.out_features : 0, RUN)),
        touched_count_(touched_count(b)),
        touched_(touched_count_) {
    if (touched_count_) touched_features(b.sparse, b.out_features, touched_count_, touched_);
  }

  // Whether add needs x and dy feature-major.
  static bool reads_packed(const Backward& b) {
    const Structure s = b.sparse.structure;
    return b.dvalues && (s == Structure::unstructured || s == Structure::block);
  }
  // Whether add leaves the runs of dy in its scratch memory, as it does for blocks of 16.
  bool fills_runs() const { return blocks_; }

  // Floats of scratch memory that add needs.
  int64_t scratch_size() const {
    return BLOCK_TOKENS * (blocks_ ? dy_runs() + rounded_up(b_.in_features, RUN) : rounded_up(touched_count_, GROUP));
  }

  // Adds a block of tokens to dS, as GradReduction lays it out. With `more`, as many tokens follow those of x and dy,
  // and their first cache lines are prefetched.
  void add(float* dS, const TokenBlock<T>& x, const TokenBlock<T>& dy, const float* packed_x, const float* packed_dy,
           float* scratch, bool more) const {
    if (reads_packed(b_)) return sample(b_.sparse, b_.out_features, packed_dy, packed_x, dS);
    if (!blocks_)
      return rows_ ? add_outer(dS, dy, x, b_.in_features, scratch) : add_outer(dS, x, dy, b_.out_features, scratch);
    float* x_runs = scratch + dy_runs() * run_tokens(x.tokens);
    copy_runs(dy.rows, dy.stride, dy.tokens, b_.out_features, dy_starts_.data(), dy_starts_.count, more, scratch);
    copy_runs(x.rows, x.stride, x.tokens, b_.in_features, x_starts_.data(), x_starts_.count, more, x_runs);
    sample_blocks(b_.sparse, b_.out_features, scratch, x_runs, x.tokens, dS);
  }

 private:
  int64_t dy_runs() const { return rounded_up(b_.out_features, RUN); }

  // S has a few features of one side, which are gathered, and all of the other side.
  void add_outer(float* dS, const TokenBlock<T>& few, const TokenBlock<T>& whole, int64_t features,
                 float* gathered) const {
    gather_columns(few.rows, few.stride, few.tokens, touched_, touched_count_, gathered,
                   rounded_up(touched_count_, GROUP));
    outer(gathered, touched_count_, whole, features, dS);
  }

  const Backward& b_;
  const bool blocks_, rows_;
  const Starts x_starts_, dy_starts_;
  const int64_t touched_count_;
  Buffer<int32_t> touched_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
