// torch.ops.rosa_kernels_cuda.{linear, linear_backward, whole_sddmm, csr_add}: cuda/composed_ops.cpp says what they
// are.
#pragma once
#include <tuple>

#include "cuda/gradients.h"
#include "cuda/linear.h"

namespace rosa::composed {

// The bits of needs.
enum class Gradient { x, weight, bias, A, B, values };
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// (y, H); H is undefined unless it is kept.
std::tuple<Tensor, Tensor> linear(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor lora_A,
                                  OptionalTensor lora_B, double scaling, OptionalTensor values, OptionalTensor crow,
                                  OptionalTensor col, int64_t structure, OptionalTensor seed, int64_t threshold,
                                  double keep_scale, int64_t base, int64_t low_rank, int64_t sparse, bool keep_H,
                                  int64_t multiprocessors, bool indices_checked);

// dx, dweight, dbias, dlora_A, dlora_B and dvalues; those that are not needed are undefined.
Gradients linear_backward(Tensor dy, Tensor x, OptionalTensor weight, OptionalTensor lora_A, OptionalTensor lora_B,
                          double scaling, OptionalTensor values, OptionalTensor crow, OptionalTensor col,
                          OptionalTensor ccol, OptionalTensor row, OptionalTensor permutation, int64_t structure,
                          OptionalTensor seed, int64_t threshold, double keep_scale, OptionalTensor H, int64_t needs,
                          int64_t base, int64_t low_rank, int64_t sparse, int64_t sddmm, int64_t multiprocessors,
                          bool indices_checked);

Tensor sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, int64_t structure, int64_t sddmm, int64_t multiprocessors,
             bool indices_checked);

Tensor csr_add(Tensor weight, Tensor values, Tensor crow, Tensor col, bool indices_checked);

}  // namespace rosa::composed
