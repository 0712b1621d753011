// dA, dB and dS.
#pragma once
#include "cuda/call.h"

namespace rosa {

// How dS is made. rosa_kernels/backends/cuda/heuristics.py says what each means, and chooses.
enum class SddmmAlgorithm { packed, library, entries_transposed };

// dA = scaling · dHᵀ dropout(x) (r, in_features) and dB = scaling · dyᵀ H (out_features, r), in the layer's dtypes.
Tensor grad_of_A(const Tensor& dH, const Tensor& x, const Layer& layer, const CallDropout& dropout,
                 int64_t multiprocessors);
Tensor grad_of_B(const Tensor& dy, const Tensor& H, const Layer& layer, int64_t multiprocessors);

// dS (nnz,) of a dtype. rows has those of S that are not empty, first, where they are at hand.
Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col, const OptionalTensor& rows,
             Structure structure, SddmmAlgorithm algorithm, ScalarType dtype, int64_t multiprocessors);

}  // namespace rosa
