// y and dx by library GEMMs and kernels, as an algorithm says.
//
// The adapter comes first and the base last: y starts as the bias and what the adapter adds, and the GEMM of the weight
// adds to it. So y is rounded once in the size of the adapter and once in its own, and no pass over y is needed that
// reads it, adds and writes it.
#pragma once
#include "cuda/call.h"

namespace rosa {

// Who multiplies the weight, and where H and x Sᵀ come from. rosa_kernels/backends/cuda/heuristics.py says what each
// means, and chooses. Its numbers are these.
enum class Base { none, library, merged };
enum class LowRank { none, kernel, library, delta };
enum class Sparse { none, shared, global, delta, rows, columns };

struct LinearAlgorithm {
  Base base;
  LowRank low_rank;
  Sparse sparse;

  // Throws where a number stands for no algorithm.
  static LinearAlgorithm of(int64_t base, int64_t low_rank, int64_t sparse);
  bool uses_H() const { return low_rank == LowRank::kernel || low_rank == LowRank::library; }
};

// out = x Wᵀ + b + scaling · H Bᵀ + x Sᵀ, where H = x Aᵀ. For dx, x stands for dy and every matrix is transposed.
struct LinearProblem {
  Tensor x;  // (T, in_features)
  int64_t out_features;
  Layer layer;  // the matrices of this product
  OptionalTensor H;
  CallDropout drop_x, drop_out;  // on x before A, or on the low-rank part of out
  const Layer* untransposed;     // the layer itself where this is dx, else null
  int64_t multiprocessors;
};

// (T, out_features). It leaves H in the problem where it made H.
Tensor linear(LinearProblem& problem, const LinearAlgorithm& algorithm);

// x Aᵀ (T, padded rank) in A's dtype: by the library where it can.
Tensor make_H(const Tensor& x, const Tensor& A, const CallDropout& dropout, int64_t multiprocessors);

}  // namespace rosa
