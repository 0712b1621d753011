// What the adapter adds to the rows of y (forward) or dx (backward), one block of tokens at a time.
#pragma once
#include "cpu/sparse/block_sparse.h"
#include "cpu/sparse/row_sparse.h"
#include "cpu/sparse/spmm.h"

namespace rosa {
namespace ROSA_ISA {

// Output features finished together, multiples of GROUP and of LANES. They are many, so that each visit to a row of y
// adds whole cache lines, but few where S comes alone, because tiles without entries are left out.
constexpr int64_t TILE = PANEL, SPARSE_TILE = 16;

// alpha · expand · H + S · in, for in_features rows of `in` and out_features of the result.
class Epilogue {
 public:
  // expand (out_features, r) through its strides; S (out_features, in_features).
  Epilogue(const float* expand, int64_t row_stride, int64_t column_stride, int64_t r, float alpha, const Csr& sparse,
           int64_t in_features, int64_t out_features)
      : r_(r),
        step_(r ? TILE : SPARSE_TILE),
        alpha_(alpha),
        in_features_(in_features),
        out_features_(out_features),
        sparse_(sparse),
        whole_rows_(whole_row_count(sparse, in_features)),
        expand_(rounded_up(out_features, GROUP) * r),
        row_weights_(rounded_up(whole_rows_, GROUP) * in_features) {
    if (r) pack_groups(expand, row_stride, column_stride, out_features, r, expand_);
    pack_groups(sparse.values, in_features, 1, whole_rows_, in_features, row_weights_);
  }

  // Floats that add_to needs to hold the products of whole rows.
  int64_t scratch_size() const { return rounded_up(whole_rows_, GROUP) * BLOCK_TOKENS; }

  // rows (tokens, out_features) += all of it. keep_bits are dropout's bits of the output features, for the low-rank
  // part alone.
  template <class T>
  void add_to(T* rows, int64_t stride, int64_t tokens, const float* H, const float* in, const uint64_t* keep_bits,
              float* scratch) const {
    add_tiles(rows, stride, tokens, H, in, keep_bits, scratch, 0, tile_count());
  }

  int64_t tile_count() const { return (out_features_ + step_ - 1) / step_; }

  // The same for tiles [begin, end) of the output features.
  template <class T>
  void add_tiles(T* rows, int64_t stride, int64_t tokens, const float* H, const float* in, const uint64_t* keep_bits,
                 float* scratch, int64_t begin, int64_t end) const {
    const int64_t used = used_width(tokens);
    multiply_whole_rows(in, scratch, used);
    alignas(64) float tile[TILE * BLOCK_TOKENS];
    for (int64_t i = begin * step_; i < smaller(end * step_, out_features_); i += step_) {
      const int64_t count = smaller(step_, out_features_ - i);
      const bool some_sparse = has_sparse(i, count);
      if (!r_ && !some_sparse) continue;
      std::memset(tile, 0, sizeof(float) * rounded_up(count, 16) * BLOCK_TOKENS);
      if (r_) {
        multiply(expand_ + i * r_, H, nullptr, count, r_, alpha_, tile, used);
        if (keep_bits) drop(keep_bits + i, count, tile);
      }
      if (some_sparse) add_sparse_tile(i, count, in, scratch, tile, used);
      add_transposed(tile, tokens, count, rows + i, stride);
    }
  }

  // The three steps of add_to that concern S: they multiply its whole rows, test for entries in output features
  // [i, i + count), and add those rows of S · in to the tile (count, BLOCK_TOKENS).
  void multiply_whole_rows(const float* in, float* scratch, int64_t used = BLOCK_TOKENS) const {
    multiply(row_weights_, in, nullptr, whole_rows_, in_features_, 1.0f, scratch, used);
  }
  bool has_sparse(int64_t i, int64_t count) const {
    return sparse_.values && sparse_.crow[i] != sparse_.crow[i + count];
  }
  void add_sparse_tile(int64_t i, int64_t count, const float* in, const float* scratch, float* tile,
                       int64_t used = BLOCK_TOKENS) const {
    if (whole_rows_)
      scatter_rows(sparse_, in_features_, i, count, scratch, tile);
    else
      add_sparse(sparse_, i, count, in, tile, used);
  }

 private:
  static void drop(const uint64_t* keep_bits, int64_t count, float* tile) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t t = 0; t < BLOCK_TOKENS; t += LANES)
        store(tile + j * BLOCK_TOKENS + t, keep(keep_bits[j] >> t, load(tile + j * BLOCK_TOKENS + t)));
  }

  int64_t r_, step_;
  float alpha_;
  int64_t in_features_, out_features_;
  Csr sparse_;
  int64_t whole_rows_;
  Buffer<float> expand_, row_weights_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
