// The low-rank part by library GEMMs alone: LoRA without dropout, all in one dtype.
#pragma once
#include "gpu/library_gemm.h"
#include "gpu/rank.h"

namespace rosa {

// x Aᵀ (T, padded rank), of x (T, in_features) and A (r, in_features).
inline Tensor library_H(const Tensor& x, const Tensor& A) {
  const int64_t T = x.size(0), r = A.size(0), R = padded_rank(r);
  Tensor H = r == R ? empty_matrix(x, T, R) : zeros(x, {T, R}, x.scalar_type());
  Tensor of_A = first_columns(H, r);
  gemm(of_A, x, transposed(A));
  return H;
}

// out = (out, where accumulate, or a bias, or zeros) + alpha · a b
inline void add_product(Tensor& out, bool accumulate, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
                        double alpha) {
  const bool starts = accumulate || bias.has_value();
  if (!starts && alpha == 1)
    gemm(out, a, b);
  else
    gemm(out, accumulate || !bias ? out : *bias, a, b, starts, alpha);
}

}  // namespace rosa
