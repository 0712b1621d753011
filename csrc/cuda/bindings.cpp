// torch.ops.rosa_kernels_cuda.*, behind PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/checked_launches.h"
#include "cuda/composed_ops.h"

namespace {

std::string build_info() { return rosa::build_info(); }

}  // namespace

STABLE_TORCH_LIBRARY(rosa_kernels_cuda, m) {
  m.def("transpose(Tensor(a!) out, Tensor x) -> ()");
  m.def(
      "gather_columns(Tensor(a!) out, Tensor x, Tensor? col, Tensor? crow, int row_length, "
      "bool indices_checked=False) -> ()");
  m.def(
      "pack_entries(Tensor(a!) packed_entries, Tensor col, Tensor? permutation, Tensor values, "
      "bool indices_checked=False) -> ()");
  m.def("split_terms(Tensor(a!) out, Tensor matrix, int row_stride, int term_stride) -> ()");
  m.def("shrink(Tensor(a!) H, Tensor x, Tensor A, Tensor? seed, int threshold, float scale, Tensor(b!)? parts) -> ()");
  m.def(
      "lora_grad(Tensor(a!) out, Tensor z, Tensor H, float scaling, "
      "Tensor? seed, int threshold, float scale, Tensor(b!)? parts) -> ()");
  m.def(
      "epilogue(Tensor(a!) y, bool accumulate, Tensor? bias, Tensor? H, Tensor? B, float scaling, "
      "Tensor? seed, int threshold, float scale, Tensor? crow, Tensor? packed_entries, "
      "Tensor? x, Tensor? x_transposed, Tensor? row_products, int row_terms, int in_features, int multiprocessors, "
      "bool indices_checked=False) -> ()");
  m.def(
      "sddmm(Tensor(a!) out, Tensor dy_transposed, Tensor x_transposed, Tensor crow, Tensor col, "
      "Tensor(b!)? parts, bool indices_checked=False) -> ()");
  m.def(
      "gather_entries(Tensor(a!) out, Tensor matrix, Tensor crow, Tensor col, "
      "bool indices_checked=False) -> ()");
  m.def(
      "densify(Tensor(a!) out, Tensor? weight, Tensor values, Tensor crow, Tensor col, "
      "bool indices_checked=False) -> ()");
  m.def(
      "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? values, "
      "Tensor? crow, Tensor? col, int structure, Tensor? seed, int threshold, float keep_scale, int base, "
      "int low_rank, int sparse, bool keep_H, int multiprocessors, bool indices_checked=False) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, float scaling, "
      "Tensor? values, Tensor? crow, Tensor? col, Tensor? ccol, Tensor? row, Tensor? permutation, int structure, "
      "Tensor? seed, int threshold, float keep_scale, Tensor? H, int needs, int base, int low_rank, int sparse, "
      "int sddmm, int multiprocessors, bool indices_checked=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "whole_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col, int structure, int sddmm, int multiprocessors, "
      "bool indices_checked=False) -> Tensor");
  m.def("csr_add(Tensor weight, Tensor values, Tensor crow, Tensor col, bool indices_checked=False) -> Tensor");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rosa_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("transpose", TORCH_BOX(&rosa::checked::transpose));
  m.impl("gather_columns", TORCH_BOX(&rosa::checked::gather_columns));
  m.impl("pack_entries", TORCH_BOX(&rosa::checked::pack_entries));
  m.impl("split_terms", TORCH_BOX(&rosa::checked::split_terms));
  m.impl("shrink", TORCH_BOX(&rosa::checked::shrink));
  m.impl("lora_grad", TORCH_BOX(&rosa::checked::lora_grad));
  m.impl("epilogue", TORCH_BOX(&rosa::checked::epilogue));
  m.impl("sddmm", TORCH_BOX(&rosa::checked::sddmm));
  m.impl("gather_entries", TORCH_BOX(&rosa::checked::gather_entries));
  m.impl("densify", TORCH_BOX(&rosa::checked::densify));
  m.impl("linear", TORCH_BOX(&rosa::composed::linear));
  m.impl("linear_backward", TORCH_BOX(&rosa::composed::linear_backward));
  m.impl("whole_sddmm", TORCH_BOX(&rosa::composed::sddmm));
  m.impl("csr_add", TORCH_BOX(&rosa::composed::csr_add));
  m.impl("build_info", TORCH_BOX(&build_info));
}
