// The ops of rosa_kernels/ops.py, each in one call: rosa_kernels/backends/cuda/ops.py chooses the algorithms, and these
// functions run the library's GEMMs and the kernels. Host time is what limits a small GPU call, and a call from Python
// takes longer than a launch.
#include "cuda/composed_ops.h"

#include "cuda/kernel_calls.h"

namespace rosa::composed {
namespace {

// A and B as the kernels take them: both in x's dtype, or both in fp32.
void put_adapters(Layer& layer, const OptionalTensor& A, const OptionalTensor& B, ScalarType dtype) {
  STD_TORCH_CHECK(A.has_value() == B.has_value(), "rosa_kernels_cuda: lora_A and lora_B: expected both or neither");
  if (!A) return;
  const bool alike = A->scalar_type() == dtype && B->scalar_type() == dtype;
  layer.A = alike ? *A : converted(*A, ScalarType::Float);
  layer.B = alike ? *B : converted(*B, ScalarType::Float);
}

Structure structure_of(int64_t number) {
  return number == 1 || number == 2 ? Structure(number) : Structure::unstructured;
}

void expect_checked(bool indices_checked) {
  STD_TORCH_CHECK(
      indices_checked,
      "rosa_kernels_cuda: call torch.ops.rosa_kernels.*, which checks the indices. This op reads and writes "
      "wherever they point; indices_checked=True says that its caller has checked them");
}

// S where there is anything in it.
std::optional<SparseMatrix> sparse_of(const OptionalTensor& values, const OptionalTensor& crow,
                                      const OptionalTensor& col, int64_t structure, int64_t in_features) {
  if (!values || values->numel() == 0) return std::nullopt;
  STD_TORCH_CHECK(crow && col, "rosa_kernels_cuda: crow and col: expected beside values");
  const ScalarType dtype = values->scalar_type() == ScalarType::Double ? ScalarType::Float : values->scalar_type();
  const int64_t rows = crow->numel() - 1;
  const SparseMatrix S{contiguous(*values, dtype), *crow, *col,       std::nullopt,
                       structure_of(structure),    rows,  in_features};
  const int64_t whole = S.structure == Structure::row ? in_features : S.structure == Structure::column ? rows : 1;
  STD_TORCH_CHECK(S.nnz() == values->numel() && whole > 0 && S.nnz() % whole == 0,
                  "rosa_kernels_cuda: values: expected one for each index, in whole rows or columns");
  return S;
}

OptionalTensor transposed(const OptionalTensor& matrix) {
  return matrix ? OptionalTensor(rosa::transposed(*matrix)) : std::nullopt;
}

// The layer's matrices for dx from dy.
Layer transposed(const Layer& layer, const OptionalTensor& ccol, const OptionalTensor& row,
                 const OptionalTensor& permutation) {
  Layer made{transposed(layer.weight), std::nullopt, transposed(layer.B), transposed(layer.A), layer.scaling, {}};
  if (layer.S) {
    STD_TORCH_CHECK(ccol && row && permutation, "rosa_kernels_cuda: ccol, row and permutation: expected beside values");
    STD_TORCH_CHECK(ccol->numel() == layer.S->columns + 1 && row->numel() == layer.S->nnz() &&
                        permutation->numel() == layer.S->nnz(),
                    "rosa_kernels_cuda: ccol, row and permutation: expected in_features + 1, nnz and nnz indices");
    const Structure structure = layer.S->structure;
    made.S = SparseMatrix{layer.S->values,
                          *ccol,
                          *row,
                          permutation,
                          structure == Structure::row      ? Structure::column
                          : structure == Structure::column ? Structure::row
                                                           : structure,
                          layer.S->columns,
                          layer.S->rows};
  }
  return made;
}

// H comes from an earlier call, or from anybody.
void expect_H(const Tensor& H, const Tensor& x, const Tensor& A) {
  const int64_t T = x.size(0), R = padded_rank(A.size(0));
  STD_TORCH_CHECK(
      H.dim() == 2 && H.size(0) == T && H.size(1) == R && H.is_contiguous() && H.scalar_type() == A.scalar_type(),
      "rosa_kernels_cuda: H: expected a contiguous matrix (", T, ", ", R, ") in the dtype of the adapters");
}

SddmmAlgorithm sddmm_algorithm(int64_t number) {
  STD_TORCH_CHECK(0 <= number && number <= 2, "rosa_kernels_cuda: sddmm_algorithm: expected 0 to 2, got ", number);
  return static_cast<SddmmAlgorithm>(number);
}

}  // namespace

std::tuple<Tensor, Tensor> linear(const Tensor x, const OptionalTensor weight, const OptionalTensor bias,
                                  const OptionalTensor lora_A, const OptionalTensor lora_B, double scaling,
                                  const OptionalTensor values, const OptionalTensor crow, const OptionalTensor col,
                                  int64_t structure, const OptionalTensor seed, int64_t threshold, double keep_scale,
                                  int64_t base, int64_t low_rank, int64_t sparse, bool keep_H, int64_t multiprocessors,
                                  bool indices_checked) {
  if (values) expect_checked(indices_checked);
  STD_TORCH_CHECK(lora_B || crow, "rosa_kernels_cuda: expected lora_B or crow");
  const Tensor x2 = as_matrix(x);
  const int64_t out_features = lora_B ? lora_B->size(0) : crow->numel() - 1;
  Layer layer{weight, bias, {}, {}, scaling, sparse_of(values, crow, col, structure, x2.size(1))};
  put_adapters(layer, lora_A, lora_B, x.scalar_type());
  LinearProblem problem{x2, out_features, layer, {}, {seed, threshold, keep_scale}, {}, nullptr, multiprocessors};
  const Tensor y = rosa::linear(problem, LinearAlgorithm::of(base, low_rank, sparse));
  STD_TORCH_CHECK(!keep_H || layer.A, "rosa_kernels_cuda: keep_H: expected false, as lora_A is None");
  if (keep_H && !problem.H) problem.H = make_H(x2, *layer.A, problem.drop_x, multiprocessors);
  return {x.dim() == 2 ? y : reshaped(y, sizes_with_features(x, out_features)), keep_H ? *problem.H : Tensor()};
}

Gradients linear_backward(const Tensor dy, const Tensor x, const OptionalTensor weight, const OptionalTensor lora_A,
                          const OptionalTensor lora_B, double scaling, const OptionalTensor values,
                          const OptionalTensor crow, const OptionalTensor col, const OptionalTensor ccol,
                          const OptionalTensor row, const OptionalTensor permutation, int64_t structure,
                          const OptionalTensor seed, int64_t threshold, double keep_scale, const OptionalTensor H,
                          int64_t needs, int64_t base, int64_t low_rank, int64_t sparse, int64_t sddmm,
                          int64_t multiprocessors, bool indices_checked) {
  if (values) expect_checked(indices_checked);
  const auto need = [&](Gradient gradient) { return (needs >> static_cast<int>(gradient) & 1) != 0; };
  const Tensor dy2 = as_matrix(dy), x2 = as_matrix(x);
  const CallDropout dropout{seed, threshold, keep_scale};
  const LinearAlgorithm of_dx = LinearAlgorithm::of(base, low_rank, sparse);
  Layer layer{weight, {}, {}, {}, scaling, sparse_of(values, crow, col, structure, x2.size(1))};
  put_adapters(layer, lora_A, lora_B, x.scalar_type());
  const bool of_adapters = need(Gradient::A) || need(Gradient::B) || H || (need(Gradient::x) && of_dx.uses_H());
  STD_TORCH_CHECK(!of_adapters || (layer.A && layer.B),
                  "rosa_kernels_cuda: lora_A and lora_B: expected beside H and their gradients");
  STD_TORCH_CHECK(dy2.size(0) == x2.size(0), "rosa_kernels_cuda: dy: expected as many tokens as x");
  if (layer.A && layer.B) {
    const Tensor &A = *layer.A, &B = *layer.B;
    STD_TORCH_CHECK(
        A.dim() == 2 && B.dim() == 2 && A.size(1) == x2.size(1) && B.size(0) == dy2.size(1) && A.size(0) == B.size(1),
        "rosa_kernels_cuda: lora_A and lora_B: expected (r, in_features) and (out_features, r)");
  }
  STD_TORCH_CHECK((values && crow && col) || !need(Gradient::values),
                  "rosa_kernels_cuda: values, crow and col: expected beside their gradient");
  if (H) expect_H(*H, x2, *layer.A);
  Tensor dx, dweight, dbias, dA, dB, dvalues;
  OptionalTensor dH;
  if (need(Gradient::A) || (need(Gradient::x) && of_dx.uses_H()))
    dH = make_H(dy2, rosa::transposed(*layer.B), CallDropout{}, multiprocessors);
  if (need(Gradient::B))
    dB = converted(grad_of_B(dy2, H ? *H : make_H(x2, *layer.A, dropout, multiprocessors), layer, multiprocessors),
                   lora_B->scalar_type());
  if (need(Gradient::A)) dA = converted(grad_of_A(*dH, x2, layer, dropout, multiprocessors), lora_A->scalar_type());
  if (need(Gradient::x)) {
    LinearProblem problem{dy2,    x2.size(1),     transposed(layer, ccol, row, permutation), dH, {}, dropout,
                          &layer, multiprocessors};
    dx = rosa::linear(problem, of_dx);
    if (x.dim() != 2) dx = reshaped(dx, sizes_with_features(x, x2.size(1)));
  }
  if (need(Gradient::values))
    dvalues = rosa::sddmm(dy2, x2, *crow, *col, row, structure_of(structure), sddmm_algorithm(sddmm),
                          values->scalar_type(), multiprocessors);
  if (need(Gradient::weight)) {
    dweight = empty_matrix(dy, dy2.size(1), x2.size(1));
    gemm(dweight, rosa::transposed(dy2), x2);
  }
  if (need(Gradient::bias)) dbias = torch::stable::sum(dy2, {{0}});
  return {dx, dweight, dbias, dA, dB, dvalues};
}

Tensor sddmm(const Tensor dy, const Tensor x, const Tensor crow, const Tensor col, int64_t structure, int64_t sddmm,
             int64_t multiprocessors, bool indices_checked) {
  expect_checked(indices_checked);
  return rosa::sddmm(as_matrix(dy), as_matrix(x), crow, col, std::nullopt, structure_of(structure),
                     sddmm_algorithm(sddmm), x.scalar_type(), multiprocessors);
}

Tensor csr_add(const Tensor weight, const Tensor values, const Tensor crow, const Tensor col, bool indices_checked) {
  expect_checked(indices_checked);
  const std::optional<SparseMatrix> S = sparse_of(values, crow, col, 0, weight.size(1));
  if (S) return dense(weight, *S, weight.scalar_type());
  Tensor copy = empty_matrix(weight, weight.size(0), weight.size(1));
  return torch::stable::copy_(copy, weight);
}

}  // namespace rosa::composed
