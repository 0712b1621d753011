// The kernels for tensors that anybody may have made: each function checks its arguments and launches one operation of
// cuda/kernels.h on PyTorch's current stream. They are ops too, torch.ops.rosa_kernels_cuda.*, for tests.
#pragma once
#include "cuda/arguments.h"

namespace rosa::checked {

void transpose(Tensor out, const Tensor x);
void gather_columns(Tensor out, const Tensor x, const OptionalTensor col, const OptionalTensor crow, int64_t row_length,
                    bool indices_checked);
void pack_entries(Tensor packed_entries, const Tensor col, const OptionalTensor permutation, const Tensor values,
                  bool indices_checked);
void split_terms(Tensor out, const Tensor matrix, int64_t row_stride, int64_t term_stride);
void shrink(Tensor H, const Tensor x, const Tensor A, const OptionalTensor seed, int64_t threshold, double scale,
            OptionalTensor parts);
void lora_grad(Tensor out, const Tensor z, const Tensor H, double scaling, const OptionalTensor seed, int64_t threshold,
               double scale, OptionalTensor parts);
void epilogue(Tensor y, bool accumulate, const OptionalTensor bias, const OptionalTensor H, const OptionalTensor B,
              double scaling, const OptionalTensor seed, int64_t threshold, double scale, const OptionalTensor crow,
              const OptionalTensor packed_entries, const OptionalTensor x, const OptionalTensor x_transposed,
              const OptionalTensor row_products, int64_t row_terms, int64_t in_features, int64_t multiprocessors,
              bool indices_checked);
void sddmm(Tensor out, const Tensor dy_transposed, const Tensor x_transposed, const Tensor crow, const Tensor col,
           OptionalTensor parts, bool indices_checked);
void gather_entries(Tensor out, const Tensor matrix, const Tensor crow, const Tensor col, bool indices_checked);
void densify(Tensor out, const OptionalTensor weight, const Tensor values, const Tensor crow, const Tensor col,
             bool indices_checked);

}  // namespace rosa::checked
