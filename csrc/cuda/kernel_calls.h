// The kernels with room for their results: what cuda/checked_launches.h writes into tensors, these functions return.
// T counts tokens. features are in_features where x is multiplied, and out_features where dy is.
#pragma once
#include "cuda/call.h"

namespace rosa {

// xᵀ (features, T rounded up to TOKEN_PADDING), with zeros beyond T.
Tensor transposed_copy(const Tensor& x);

// x[:, columns], of a matrix whose rows begin at multiples of 16 bytes, `repeats` times beside itself.
Tensor gathered_columns(const Tensor& x, const Tensor& columns, int64_t count, int64_t repeats);

// x[:, rows of crow that are not empty], each of row_length entries.
Tensor gathered_whole_rows(const Tensor& x, const Tensor& crow, int64_t count, int64_t row_length);

// S's entries as the epilogue reads them.
Tensor packed_entries(const SparseMatrix& S);

// SPLIT_TERMS bf16 matrices whose sum is an fp32 one (rows, columns): below each other, or beside each other.
Tensor terms_below_each_other(const Tensor& matrix);
Tensor terms_beside_each_other(const Tensor& matrix);

// H = dropout(x) Aᵀ (T, padded rank) in A's dtype.
Tensor shrunk(const Tensor& x, const Tensor& A, const CallDropout& dropout, int64_t multiprocessors);

// out (features, r) = scaling · dropout(z)ᵀ H[:, :r]; out has H's dtype and any strides.
void add_up_lora_grad(const Tensor& out, const Tensor& z, const Tensor& H, double scaling, const CallDropout& dropout,
                      int64_t multiprocessors);

// Σ_t dy[t, row] x[t, col] for each entry (nnz,), one dot product after another.
Tensor entries_of_product(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col, ScalarType dtype,
                          int64_t multiprocessors);

// The numbers of a matrix at a pattern's places, (nnz,).
Tensor gathered_entries(const Tensor& matrix, const Tensor& crow, const Tensor& col, ScalarType dtype);

// weight + S, or S alone, as a dense matrix of a dtype.
Tensor dense(const OptionalTensor& weight, const SparseMatrix& S, ScalarType dtype);

// matrix += S
void add_sparse(Tensor& matrix, const SparseMatrix& S);

}  // namespace rosa
