#include "cuda/gradients.h"

#include "cuda/kernel_calls.h"

namespace rosa {
namespace {

// a b: rounded once where its dtype is the wanted one, else the fp32 sums.
Tensor product(const Tensor& a, const Tensor& b, ScalarType wanted) {
  if (a.scalar_type() != wanted && a.scalar_type() != ScalarType::Float) return fp32_product(a, b);
  Tensor out = empty_matrix(a, a.size(0), b.size(1));
  gemm(out, a, b);
  return out;
}

}  // namespace

Tensor grad_of_A(const Tensor& dH, const Tensor& x, const Layer& layer, const CallDropout& dropout,
                 int64_t multiprocessors) {
  Tensor dA = empty_matrix(*layer.A, layer.A->size(0), layer.A->size(1));
  if (dropout.seed || dA.scalar_type() != x.scalar_type())
    add_up_lora_grad(transposed(dA), x, dH, layer.scaling, dropout, multiprocessors);
  else
    gemm(dA, dA, transposed(first_columns(dH, dA.size(0))), x, 0, layer.scaling);
  return dA;
}

Tensor grad_of_B(const Tensor& dy, const Tensor& H, const Layer& layer, int64_t multiprocessors) {
  Tensor dB = empty_matrix(*layer.B, layer.B->size(0), layer.B->size(1));
  if (dB.scalar_type() != dy.scalar_type())
    add_up_lora_grad(dB, dy, H, layer.scaling, CallDropout{}, multiprocessors);
  else
    gemm(dB, dB, transposed(dy), first_columns(H, dB.size(1)), 0, layer.scaling);
  return dB;
}

Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col, const OptionalTensor& rows,
             Structure structure, SddmmAlgorithm algorithm, ScalarType dtype, int64_t multiprocessors) {
  const int64_t nnz = col.numel();
  STD_TORCH_CHECK(dy.size(0) == x.size(0), "rosa_kernels_cuda: dy: expected as many tokens as x");
  STD_TORCH_CHECK(crow.numel() == dy.size(1) + 1, "rosa_kernels_cuda: crow: expected out_features + 1 indices");
  if (nnz == 0) return empty(x, {0}, dtype);
  STD_TORCH_CHECK(x.size(1) > 0 && dy.size(1) > 0,
                  "rosa_kernels_cuda: col: expected no entries of a matrix without any");
  const int64_t whole = structure == Structure::row ? x.size(1) : structure == Structure::column ? dy.size(1) : 1;
  STD_TORCH_CHECK(nnz % whole == 0 && (structure != Structure::unstructured || algorithm != SddmmAlgorithm::packed),
                  "rosa_kernels_cuda: structure: expected whole rows or columns");
  if (algorithm == SddmmAlgorithm::entries_transposed)
    return entries_of_product(dy, x, crow, col, dtype, multiprocessors);
  if (algorithm == SddmmAlgorithm::library)
    return gathered_entries(product(transposed(dy), x, dtype), crow, col, dtype);
  Tensor packed;
  if (structure == Structure::row) {
    const int64_t count = nnz / x.size(1);
    const Tensor of_rows =
        rows ? gathered_columns(dy, *rows, count, 1) : gathered_whole_rows(dy, crow, count, x.size(1));
    packed = product(transposed(of_rows), x, dtype);
  } else {
    packed = product(transposed(dy), gathered_columns(x, col, nnz / dy.size(1), 1), dtype);
  }
  return converted(reshaped(packed, {nnz}), dtype);
}

}  // namespace rosa
