// torch.ops.rosa_kernels_cpu.*: the CPU kernels behind PyTorch's stable ABI, one binary for every torch from 2.10 on.
// rosa_kernels/functional.py checks the arguments and rosa_kernels/backends/cpu/ops.py lays them out; the checks here
// are assertions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common/kernels.h"

namespace rosa {

void run_slots(int64_t slots, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) body(context, slot);
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The best instruction set of this processor, or the one that ROSA_KERNELS_CPU names.
const KernelTable& kernels() {
  static const KernelTable* chosen = [] {
    const Supported& supported = supported_kernels();
    const char* wish = std::getenv("ROSA_KERNELS_CPU");
    if (!wish || !*wish) return supported.kernels[0];
    std::string names;
    for (int i = 0; i < supported.count; ++i) {
      if (std::strcmp(wish, supported.kernels[i]->instruction_set) == 0) return supported.kernels[i];
      names += std::string(i ? ", " : "") + supported.kernels[i]->instruction_set;
    }
    STD_TORCH_CHECK(false, "ROSA_KERNELS_CPU=", wish, ": expected one of those that this processor has: ", names);
    return (const KernelTable*)nullptr;
  }();
  return *chosen;
}

std::string instruction_set() { return kernels().instruction_set; }

// The numbers that Python has too; tests/cpu/test_constants.py compares them.
std::string constants() {
  const auto pair = [](const char* name, int64_t value) { return std::string(name) + "=" + std::to_string(value); };
  return pair("BLOCK_TOKENS", BLOCK_TOKENS) + pair(" UNSTRUCTURED", (int64_t)Structure::unstructured) +
         pair(" ROW", (int64_t)Structure::row) + pair(" COLUMN", (int64_t)Structure::column) +
         pair(" BLOCK", (int64_t)Structure::block) + pair(" BLOCK16", (int64_t)Structure::block16);
}

std::string build_info() {
  const Supported& supported = supported_kernels();
  std::string info = "C++ compiler " __VERSION__ ", kernels for";
  for (int i = 0; i < supported.count; ++i) info += std::string(" ") + supported.kernels[i]->instruction_set;
  return info + supported.left_out;
}

Dtype dtype_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  "float32 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

Matrix matrix_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1),
                  "a matrix of unit column stride");
  return {t.data_ptr(), t.stride(0)};
}

const float* floats_of(const OptionalTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), "contiguous float32");
  return static_cast<const float*>(t->data_ptr());
}

const int32_t* ints_of(const OptionalTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(), "contiguous int32");
  return static_cast<const int32_t*>(t->data_ptr());
}

LowRank low_rank_of(const OptionalTensor& A, const OptionalTensor& B, double scaling, bool bfloat16 = false) {
  if (!A) return {};
  return {A->size(0), floats_of(A), floats_of(B), static_cast<float>(scaling), bfloat16};
}

// An empty S counts as none: its value pointer may be null.
Csr csr_of(const OptionalTensor& values, const OptionalTensor& crow, const OptionalTensor& col, int64_t structure) {
  if (!values || values->numel() == 0) return {};
  return {ints_of(crow), ints_of(col), floats_of(values), values->numel(), static_cast<Structure>(structure)};
}

Dropout dropout_of(const OptionalTensor& seed, int64_t threshold, double scale) {
  if (!seed) return {};
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "one int64 seed");
  return {true, *static_cast<const uint64_t*>(seed->data_ptr()), static_cast<uint64_t>(threshold),
          static_cast<float>(scale)};
}

// The base layer's weight, for the kernels that multiply by it.
Matrix weight_of(const OptionalTensor& weight, const Tensor& x) {
  if (!weight) return {};
  STD_TORCH_CHECK(kernels().multiplies_weight && dtype_of(x) == Dtype::bfloat16, "kernels that multiply by a weight");
  STD_TORCH_CHECK(dtype_of(*weight) == Dtype::bfloat16, "a weight of x's dtype");
  return matrix_of(*weight);
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensor packed(const Tensor& t, ScalarType dtype) {
  return packed(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// Lays its arguments out itself: doing so in Python, as for the other operators, would take longer than the kernel.
Tensor decode(const Tensor x, const OptionalTensor weight, const OptionalTensor bias, const OptionalTensor A,
              const OptionalTensor B, double scaling, const OptionalTensor values, const OptionalTensor crow,
              const OptionalTensor col, int64_t out_features, const OptionalTensor seed, int64_t threshold,
              double scale) {
  const Tensor rows = packed(x);
  std::vector<int64_t> shape(rows.sizes().begin(), rows.sizes().end());
  Decode f{};
  f.dtype = dtype_of(rows);
  f.in_features = shape.back();
  f.out_features = shape.back() = out_features;
  const Tensor y = torch::stable::new_empty(rows, shape);
  f.tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) f.tokens *= shape[i];
  f.x = {rows.data_ptr(), f.in_features};
  f.y = {y.data_ptr(), out_features};
  OptionalTensor kept[5];  // what the struct points into
  if (weight) {
    STD_TORCH_CHECK(weight->scalar_type() == rows.scalar_type(), "a weight of x's dtype");
    const bool readable = weight->stride(1) == 1 && weight->stride(0) >= f.in_features;
    f.weight = matrix_of(*(kept[0] = readable ? *weight : packed(*weight)));
  }
  if (bias) f.bias = (kept[1] = packed(*bias, rows.scalar_type()))->data_ptr();
  if (A) {
    const ScalarType dtype = A->scalar_type() == B->scalar_type() && A->scalar_type() == ScalarType::BFloat16
                                 ? ScalarType::BFloat16
                                 : ScalarType::Float;
    f.r = A->size(0);
    f.A = (kept[2] = packed(*A, dtype))->data_ptr();
    f.B = (kept[3] = packed(*B, dtype))->data_ptr();
    f.adapter_dtype = dtype_of(*kept[2]);
    f.scaling = static_cast<float>(scaling);
  }
  if (values) f.sparse = csr_of(kept[4] = packed(*values, ScalarType::Float), crow, col, 0);
  f.dropout = dropout_of(seed, threshold, scale);
  STD_TORCH_CHECK(
      f.tokens <= BLOCK_TOKENS && (!weight || (weight->size(0) == out_features && weight->size(1) == f.in_features)) &&
          (!bias || bias->numel() == out_features) && (!A || A->size(1) == f.in_features) &&
          (!A || (B->size(0) == out_features && B->size(1) == f.r)) && (!crow || crow->numel() == out_features + 1),
      "one block of tokens and factors of fitting sizes");
  kernels().decode(f);
  return y;
}

void forward(Tensor y, const Tensor x, const OptionalTensor weight, const OptionalTensor bias, const OptionalTensor A,
             const OptionalTensor B, double scaling, const OptionalTensor values, const OptionalTensor crow,
             const OptionalTensor col, int64_t structure, const OptionalTensor seed, int64_t threshold, double scale,
             bool bfloat16_adapters, bool fresh_y) {
  Forward f{};
  f.dtype = dtype_of(x);
  f.tokens = x.size(0);
  f.in_features = x.size(1);
  f.out_features = y.size(1);
  f.y = matrix_of(y);
  f.x = matrix_of(x);
  f.fresh_y = fresh_y;
  f.low_rank = low_rank_of(A, B, scaling, bfloat16_adapters);
  f.dropout = dropout_of(seed, threshold, scale);
  f.sparse = csr_of(values, crow, col, structure);
  f.weight = weight_of(weight, x);
  if (bias) {
    STD_TORCH_CHECK(weight && dtype_of(*bias) == dtype_of(x) && bias->is_contiguous(), "a bias of a weight");
    f.bias = bias->data_ptr();
  }
  STD_TORCH_CHECK(!fresh_y || !A, "S alone makes y");
  kernels().forward(f);
}

void backward(const OptionalTensor dx, const OptionalTensor dA, const OptionalTensor dB, const OptionalTensor dvalues,
              const Tensor dy, const Tensor x, const OptionalTensor weight, const OptionalTensor A,
              const OptionalTensor B, double scaling, const OptionalTensor values, const OptionalTensor crow,
              const OptionalTensor col, const OptionalTensor ccol, const OptionalTensor row,
              const OptionalTensor permutation, int64_t structure, const OptionalTensor seed, int64_t threshold,
              double scale, bool bfloat16_adapters) {
  Backward b{};
  b.dtype = dtype_of(x);
  b.tokens = x.size(0);
  b.in_features = x.size(1);
  b.out_features = dy.size(1);
  if (dx) b.dx = matrix_of(*dx);
  b.dy = matrix_of(dy);
  b.x = matrix_of(x);
  b.low_rank = low_rank_of(A, B, scaling, bfloat16_adapters);
  b.weight = weight_of(weight, x);
  b.dropout = dropout_of(seed, threshold, scale);
  b.sparse = csr_of(values, crow, col, structure);
  b.ccol = ints_of(ccol);
  b.row = ints_of(row);
  b.permutation = ints_of(permutation);
  b.dA = const_cast<float*>(floats_of(dA));
  b.dB = const_cast<float*>(floats_of(dB));
  b.dvalues = b.sparse.values ? const_cast<float*>(floats_of(dvalues)) : nullptr;
  kernels().backward(b);
}

// The strip of the weight that starts at first_row and first_column.
Merge strip_of(const Tensor& weight, const OptionalTensor& A, const OptionalTensor& B, double scaling,
               const OptionalTensor& values, const OptionalTensor& crow, const OptionalTensor& col, int64_t first_row,
               int64_t rows, int64_t first_column, int64_t columns) {
  Merge m{};
  m.weight_dtype = dtype_of(weight);
  m.in_features = weight.size(1);
  m.first_row = first_row;
  m.rows = rows;
  m.first_column = first_column;
  m.columns = columns;
  m.weight = matrix_of(weight);
  m.low_rank = low_rank_of(A, B, scaling);
  m.sparse = csr_of(values, crow, col, 0);
  STD_TORCH_CHECK(first_row >= 0 && first_row + rows <= weight.size(0) && first_column >= 0 &&
                      first_column + columns <= m.in_features,
                  "a strip of the weight");
  return m;
}

void merge(Tensor out, const Tensor weight, const OptionalTensor A, const OptionalTensor B, double scaling,
           const OptionalTensor values, const OptionalTensor crow, const OptionalTensor col, int64_t first_row,
           int64_t first_column) {
  Merge m = strip_of(weight, A, B, scaling, values, crow, col, first_row, out.size(0), first_column, out.size(1));
  m.out_dtype = dtype_of(out);
  m.out = matrix_of(out);
  STD_TORCH_CHECK(m.out_dtype == Dtype::float32 || (m.out_dtype == m.weight_dtype && m.low_rank.r == 0),
                  "a low-rank part is merged in float32 alone");
  kernels().merge(m);
}

void gemm(Tensor y, const Tensor x, const Tensor weight, const OptionalTensor bias, const OptionalTensor A,
          const OptionalTensor B, double scaling, const OptionalTensor values, const OptionalTensor crow,
          const OptionalTensor col, int64_t first, bool transposed) {
  Gemm p{};
  p.tokens = x.size(0);
  p.y = matrix_of(y);
  p.x = matrix_of(x);
  p.bias = floats_of(bias);
  p.transposed = transposed;
  p.weight = transposed ? strip_of(weight, A, B, scaling, values, crow, col, 0, weight.size(0), first, y.size(1))
                        : strip_of(weight, A, B, scaling, values, crow, col, first, y.size(1), 0, weight.size(1));
  STD_TORCH_CHECK(dtype_of(x) == Dtype::float32 && dtype_of(y) == Dtype::float32 &&
                      p.weight.weight_dtype == Dtype::float32 && y.size(0) == p.tokens &&
                      x.size(1) == weight.size(transposed ? 0 : 1),
                  "float32 matrices of fitting sizes");
  kernels().gemm(p);
}

}  // namespace
}  // namespace rosa

STABLE_TORCH_LIBRARY(rosa_kernels_cpu, m) {
  m.def(
      "decode(Tensor x, Tensor? weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? "
      "values, "
      "Tensor? crow, Tensor? col, int out_features, Tensor? seed, int threshold, float scale) -> Tensor");
  m.def(
      "forward(Tensor(a!) y, Tensor x, Tensor? weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, "
      "Tensor? values, Tensor? crow, Tensor? col, int structure, Tensor? seed, int threshold, float scale, "
      "bool bfloat16_adapters, bool fresh_y=False) -> ()");
  m.def(
      "backward(Tensor(a!)? dx, Tensor(b!)? dA, Tensor(c!)? dB, Tensor(d!)? dvalues, Tensor dy, Tensor x, Tensor? "
      "weight, "
      "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? values, Tensor? crow, Tensor? col, Tensor? ccol, "
      "Tensor? row, Tensor? permutation, int structure, Tensor? seed, int threshold, float scale, "
      "bool bfloat16_adapters) -> ()");
  m.def(
      "merge(Tensor(a!) out, Tensor weight, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? values, Tensor? "
      "crow, "
      "Tensor? col, int first_row, int first_column) -> ()");
  m.def(
      "gemm(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, "
      "Tensor? values, Tensor? crow, Tensor? col, int first, bool transposed) -> ()");
  m.def("intel_processor() -> bool");
  m.def("fast_bfloat16() -> bool");
  m.def("constants() -> str");
  m.def("instruction_set() -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rosa_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("decode", TORCH_BOX(&rosa::decode));
  m.impl("forward", TORCH_BOX(&rosa::forward));
  m.impl("backward", TORCH_BOX(&rosa::backward));
  m.impl("merge", TORCH_BOX(&rosa::merge));
  m.impl("gemm", TORCH_BOX(&rosa::gemm));
  m.impl("intel_processor", TORCH_BOX(&rosa::intel_processor));
  m.impl("fast_bfloat16", TORCH_BOX(&rosa::fast_bfloat16));
  m.impl("constants", TORCH_BOX(&rosa::constants));
  m.impl("instruction_set", TORCH_BOX(&rosa::instruction_set));
  m.impl("build_info", TORCH_BOX(&rosa::build_info));
}
