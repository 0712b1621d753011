// What the composed ops know of a call: the layer's tensors, and S and dropout as kernels take them.
#pragma once
#include "cuda/constants.h"
#include "gpu/low_rank.h"

namespace rosa {

// Dropout of the low-rank path, as rosa_kernels/dropout.py says. Without a seed nothing is dropped.
struct CallDropout {
  OptionalTensor seed;
  int64_t threshold = 0;
  double keep_scale = 1;
};

enum class Structure { unstructured = 0, row = 1, column = 2 };  // as rosa_kernels/pattern.py counts; others are 0 here

// S (rows, columns) with its entries by rows. The transpose of a layer's S shares the values: entry e has
// values[permutation[e]].
struct SparseMatrix {
  Tensor values, crow, col;
  OptionalTensor permutation;
  Structure structure;
  int64_t rows, columns;

  int64_t nnz() const { return col.numel(); }

  // The values of the rows that are not empty, for Structure::row: (count, columns).
  Tensor whole_rows() const {
    const int64_t count = nnz() / columns;
    return permutation ? view(values, {count, columns}, {1, count}) : view(values, {count, columns}, {columns, 1});
  }

  // The values of the columns that are not empty, for Structure::column: (rows, count).
  Tensor whole_columns() const {
    const int64_t count = nnz() / rows;
    return permutation ? view(values, {rows, count}, {1, rows}) : view(values, {rows, count}, {count, 1});
  }
};

// A layer, of which any part may be missing. A and B are both in x's dtype, or both in fp32.
struct Layer {
  OptionalTensor weight, bias, A, B;
  double scaling = 1;
  std::optional<SparseMatrix> S;
};

}  // namespace rosa
