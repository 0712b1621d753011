// torch.ops.rosa_kernels_cpu.*: the CPU kernels behind PyTorch's stable ABI, one binary for every torch from 2.10 on.
// rosa_kernels/backends/cpu/ops.py lays the arguments out. Anyone may call an operator, so that each checks its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/common/loop_order.h"
#include "cpu/index_checks.h"

namespace rosa {

void run_slots(int64_t slots, void (*body)(void*, int64_t), void* context) {
  const auto run = [&](int64_t begin, int64_t end) {
    LoopOrder::before_slots();
    for (int64_t slot = begin; slot < end; ++slot) body(context, slot);
    LoopOrder::after_slots();
  };
  LoopOrder::before_loop();
  torch::stable::parallel_for(0, slots, 1, run);
  LoopOrder::after_loop();
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

// The best instruction set of this processor, or the one that ROSA_KERNELS_CPU names.
// rosa_kernels/backends/cpu/binary.py refuses a name that is not among them.
const KernelTable& kernels() {
  static const KernelTable* const chosen = [] {
    const Supported& supported = supported_kernels();
    const char* const wish = std::getenv("ROSA_KERNELS_CPU");
    for (int i = 0; wish && i < supported.count; ++i)
      if (std::strcmp(wish, supported.kernels[i]->instruction_set) == 0) return supported.kernels[i];
    return supported.kernels[0];
  }();
  return *chosen;
}

std::string instruction_set() { return kernels().instruction_set; }

// Those that this processor runs, the best first.
std::string instruction_sets() {
  const Supported& supported = supported_kernels();
  std::string names;
  for (int i = 0; i < supported.count; ++i) names += std::string(i ? " " : "") + supported.kernels[i]->instruction_set;
  return names;
}

// The numbers that Python has too; tests/cpu/test_constants.py compares them.
std::string constants() {
  const auto pair = [](const char* name, int64_t value) { return std::string(name) + "=" + std::to_string(value); };
  return pair("BLOCK_TOKENS", BLOCK_TOKENS) + pair(" UNSTRUCTURED", (int64_t)Structure::unstructured) +
         pair(" ROW", (int64_t)Structure::row) + pair(" COLUMN", (int64_t)Structure::column) +
         pair(" BLOCK", (int64_t)Structure::block) + pair(" BLOCK16", (int64_t)Structure::block16);
}

std::string build_info() {
  return "C++ compiler " __VERSION__ ", kernels for " + instruction_sets() + supported_kernels().left_out;
}

// S, which is none where it has no entries: the pointer of no values may be null.
Csr csr_of(const Argument& values, const Argument& crow, const Argument& col, int64_t structure, int64_t in_features,
           int64_t out_features, bool indices_checked) {
  if (structure < 0 || structure > (int64_t)Structure::block16)
    refuse("structure", "expected a number from 0 to 4, got " + std::to_string(structure));
  expect_together({&values, &crow, &col});
  if (!values) return {};
  values.expect_dim(1);
  const int64_t nnz = values.size(0);
  const Csr s = {crow.ints(out_features + 1), col.ints(nnz), values.floats(nnz), nnz, (Structure)structure};
  if (nnz == 0) return {};
  if (!indices_checked) refuse_fault(csr_fault(s, out_features, in_features));
  return s;
}

// The base layer's weight, for the kernels that multiply by it.
Matrix weight_of(const Argument& weight, const Argument& x, int64_t in_features, int64_t out_features) {
  if (!weight) return {};
  if (!kernels().multiplies_weight || x.dtype() != Dtype::bfloat16)
    refuse("weight",
           "expected None: the kernels of " + instruction_set() + " for " + x.dtype_name() + " do not multiply by it");
  weight.dtype_as(x);
  return weight.matrix(out_features, in_features);
}

// The argument contiguous and of this dtype. Where it is not so yet, `copy` holds what it then points into.
Argument laid_out(const Argument& argument, ScalarType dtype, OptionalTensor& copy) {
  if (!argument || (argument.is(dtype) && argument.contiguous())) return argument;
  argument.expect_floating();
  copy = argument.is(dtype) ? argument.tensor() : torch::stable::to(argument.tensor(), dtype);
  copy = torch::stable::contiguous(*copy);
  return Argument(argument.name, copy);
}

// Lays its arguments out itself: doing so in Python, as for the other operators, would take longer than the kernel.
Tensor decode(const Tensor& x_, const OptionalTensor& weight_, const OptionalTensor& bias_, const OptionalTensor& A_,
              const OptionalTensor& B_, double scaling, const OptionalTensor& values_, const OptionalTensor& crow_,
              const OptionalTensor& col_, int64_t out_features, const OptionalTensor& seed_, int64_t threshold,
              double scale, bool indices_checked) {
  const Argument given_x("x", x_), given_weight("weight", weight_), given_bias("bias", bias_), given_A("lora_A", A_);
  const Argument given_B("lora_B", B_), given_values("values", values_), crow("crow", crow_), col("col", col_);
  const Argument seed("seed", seed_);
  if (!indices_checked)
    expect_memory({}, {&given_x, &given_weight, &given_bias, &given_A, &given_B, &given_values, &crow, &col, &seed});
  if (given_x.dim() == 0) refuse("x", "expected sizes (..., in_features), got a number");
  if (!given_weight && !given_A && !given_values) refuse("weight", "expected a weight, lora_A or values");
  if (out_features < 0 || out_features > MOST_FEATURES)
    refuse("out_features", "expected 0 to 2^31 - 1, got " + std::to_string(out_features));
  // Sizes come first: a copy of a wrong argument could take all memory.
  Decode f{};
  f.dtype = given_x.dtype();
  f.in_features = given_x.size(given_x.dim() - 1);
  f.out_features = out_features;
  f.tokens = tokens_of_a_block(given_x);
  expect_features(given_x, f.in_features);
  if (given_weight) given_weight.dtype_as(given_x), given_weight.expect_sizes(out_features, f.in_features);
  if (given_bias) given_bias.dtype_as(given_x), given_bias.expect_sizes(out_features);
  expect_together({&given_A, &given_B});
  if (given_A) {
    f.r = rank_of(given_A);
    given_A.expect_sizes(f.r, f.in_features);
    given_B.expect_sizes(out_features, f.r);
  }
  expect_together({&given_values, &crow, &col});
  if (given_values) given_values.expect_dim(1), col.ints(given_values.size(0));

  OptionalTensor copies[6];  // what the struct points into
  const ScalarType dtype = f.dtype == Dtype::float32 ? ScalarType::Float : ScalarType::BFloat16;
  const Argument x = laid_out(given_x, dtype, copies[0]);
  const bool readable = !given_weight || (given_weight.stride(1) == 1 && given_weight.stride(0) >= f.in_features);
  const Argument weight = readable ? given_weight : laid_out(given_weight, dtype, copies[1]);
  const Argument bias = laid_out(given_bias, dtype, copies[2]);
  const bool bfloat16 = given_A && given_A.is(ScalarType::BFloat16) && given_B.is(ScalarType::BFloat16);
  const ScalarType adapter_dtype = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Argument A = laid_out(given_A, adapter_dtype, copies[3]), B = laid_out(given_B, adapter_dtype, copies[4]);
  const Argument values = laid_out(given_values, ScalarType::Float, copies[5]);
  f.x = {x.data(), f.in_features};
  if (weight) f.weight = weight.matrix(out_features, f.in_features);
  if (bias) f.bias = bias.data();
  if (A) {
    f.A = A.data();
    f.B = B.data();
    f.adapter_dtype = A.dtype();
    f.scaling = static_cast<float>(scaling);
  }
  f.sparse = csr_of(values, crow, col, (int64_t)Structure::unstructured, f.in_features, out_features, indices_checked);
  f.dropout = dropout_of(seed, threshold, scale);

  std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dim());
  sizes.back() = out_features;
  const Tensor y = torch::stable::new_empty(x_, sizes);
  f.y = {y.data_ptr(), out_features};
  if (f.tokens && out_features) kernels().decode(f);
  return y;
}

void forward(const Tensor& y_, const Tensor& x_, const OptionalTensor& weight_, const OptionalTensor& bias_,
             const OptionalTensor& A_, const OptionalTensor& B_, double scaling, const OptionalTensor& values_,
             const OptionalTensor& crow_, const OptionalTensor& col_, int64_t structure, const OptionalTensor& seed_,
             int64_t threshold, double scale, bool bfloat16_adapters, bool fresh_y, bool indices_checked) {
  const Argument y("y", y_), x("x", x_), weight("weight", weight_), bias("bias", bias_), A("lora_A", A_);
  const Argument B("lora_B", B_), values("values", values_), crow("crow", crow_), col("col", col_), seed("seed", seed_);
  if (!indices_checked) expect_memory({&y}, {&x, &weight, &bias, &A, &B, &values, &crow, &col, &seed});
  expect_tokens_and_features(x);
  expect_tokens_and_features(y);
  Forward f{};
  f.dtype = y.dtype_as(x);
  f.tokens = x.size(0);
  f.in_features = x.size(1);
  f.out_features = y.size(1);
  f.y = y.result(f.tokens, f.out_features);
  f.x = x.matrix(f.tokens, f.in_features);
  f.fresh_y = fresh_y;
  f.low_rank = low_rank_of(A, B, scaling, f.in_features, f.out_features, bfloat16_adapters);
  f.dropout = dropout_of(seed, threshold, scale);
  f.sparse = csr_of(values, crow, col, structure, f.in_features, f.out_features, indices_checked);
  f.weight = weight_of(weight, x, f.in_features, f.out_features);
  if (bias && !weight) refuse("bias", "expected None without a weight");
  if (bias) f.bias = bias.numbers_as(x, f.out_features);
  if (fresh_y && (A || weight)) refuse("fresh_y", "expected False with lora_A or a weight");
  if (!y.empty()) kernels().forward(f);
}

void backward(const OptionalTensor& dx_, const OptionalTensor& dA_, const OptionalTensor& dB_,
              const OptionalTensor& dvalues_, const Tensor& dy_, const Tensor& x_, const OptionalTensor& weight_,
              const OptionalTensor& A_, const OptionalTensor& B_, double scaling, const OptionalTensor& values_,
              const OptionalTensor& crow_, const OptionalTensor& col_, const OptionalTensor& ccol_,
              const OptionalTensor& row_, const OptionalTensor& permutation_, int64_t structure,
              const OptionalTensor& seed_, int64_t threshold, double scale, bool bfloat16_adapters,
              bool indices_checked) {
  const Argument dx("dx", dx_), dA("dA", dA_), dB("dB", dB_), dvalues("dvalues", dvalues_), dy("dy", dy_), x("x", x_);
  const Argument weight("weight", weight_), A("lora_A", A_), B("lora_B", B_), values("values", values_);
  const Argument crow("crow", crow_), col("col", col_);
  const Argument ccol("ccol", ccol_), row("row", row_), permutation("permutation", permutation_), seed("seed", seed_);
  if (!indices_checked) {
    expect_memory({&dx, &dA, &dB, &dvalues}, {&dy, &x, &weight, &A, &B, &crow, &col, &ccol, &row, &permutation, &seed});
    expect_memory({&dx, &dA, &dB}, {&values});  // dvalues may be written over them: it comes after all else
  }
  expect_tokens_and_features(x);
  expect_tokens_and_features(dy);
  Backward b{};
  b.dtype = dy.dtype_as(x);
  b.tokens = x.size(0);
  b.in_features = x.size(1);
  b.out_features = dy.size(1);
  b.x = x.matrix(b.tokens, b.in_features);
  b.dy = dy.matrix(b.tokens, b.out_features);
  b.low_rank = low_rank_of(A, B, scaling, b.in_features, b.out_features, bfloat16_adapters);
  b.weight = weight_of(weight, x, b.in_features, b.out_features);
  b.dropout = dropout_of(seed, threshold, scale);
  b.sparse = csr_of(values, crow, col, structure, b.in_features, b.out_features, indices_checked);
  expect_together({&ccol, &row, &permutation});
  if (ccol && !values) refuse("ccol", "expected None without values");
  if (ccol) {
    b.ccol = ccol.ints(b.in_features + 1);
    b.row = row.ints(values.size(0));
    b.permutation = permutation.ints(values.size(0));
  }
  if (dx) {
    dx.dtype_as(x);
    b.dx = dx.result(b.tokens, b.in_features);
    if (values && !ccol) refuse("ccol", "expected a tensor, as for dx and values");
  }
  if ((dA || dB) && !A) refuse("lora_A", "expected a tensor, as for dA or dB");
  if (dvalues && !values) refuse("values", "expected a tensor, as for dvalues");
  if (dA) b.dA = const_cast<float*>(dA.floats(b.low_rank.r, b.in_features));
  if (dB) b.dB = const_cast<float*>(dB.floats(b.out_features, b.low_rank.r));
  if (dvalues) b.dvalues = const_cast<float*>(dvalues.floats(values.size(0)));
  if (!b.sparse.values) b.dvalues = nullptr;
  if (b.ccol && b.sparse.values && !indices_checked)
    refuse_fault(transpose_fault(b.sparse, b.ccol, b.row, b.permutation, b.out_features, b.in_features));
  kernels().backward(b);
}

// The strip of the weight that starts at first_row and first_column.
Merge strip_of(const Argument& weight, const Argument& A, const Argument& B, double scaling, const Argument& values,
               const Argument& crow, const Argument& col, int64_t first_row, int64_t rows, int64_t first_column,
               int64_t columns, bool indices_checked) {
  expect_weight(weight);
  const int64_t out_features = weight.size(0);
  Merge m{};
  m.weight_dtype = weight.dtype();
  m.in_features = weight.size(1);
  m.first_row = first_row;
  m.rows = rows;
  m.first_column = first_column;
  m.columns = columns;
  m.weight = weight.matrix(out_features, m.in_features);
  m.low_rank = low_rank_of(A, B, scaling, m.in_features, out_features);
  m.sparse = csr_of(values, crow, col, 0, m.in_features, out_features, indices_checked);
  const auto expect_within = [](const char* name, int64_t first, int64_t count, int64_t all) {
    if (first < 0 || count > all || first > all - count)
      refuse(name, "expected " + std::to_string(count) + " from it on within the weight's " + std::to_string(all) +
                       ", got " + std::to_string(first));
  };
  expect_within("first_row", first_row, rows, out_features);
  expect_within("first_column", first_column, columns, m.in_features);
  return m;
}

void merge(const Tensor& out_, const Tensor& weight_, const OptionalTensor& A_, const OptionalTensor& B_,
           double scaling, const OptionalTensor& values_, const OptionalTensor& crow_, const OptionalTensor& col_,
           int64_t first_row, int64_t first_column, bool indices_checked) {
  const Argument out("out", out_), weight("weight", weight_), A("lora_A", A_), B("lora_B", B_);
  const Argument values("values", values_), crow("crow", crow_), col("col", col_);
  if (!indices_checked) expect_memory({&out}, {&weight, &A, &B, &values, &crow, &col});
  out.expect_dim(2);
  const int64_t rows = out.size(0), columns = out.size(1);
  Merge m = strip_of(weight, A, B, scaling, values, crow, col, first_row, rows, first_column, columns, indices_checked);
  m.out_dtype = out.dtype();
  m.out = out.result(rows, columns);
  if (m.out_dtype != Dtype::float32 && (A || m.weight_dtype != m.out_dtype))
    refuse("out", "expected float32, or the weight's dtype without lora_A");
  if (!out.empty()) kernels().merge(m);
}

void gemm(const Tensor& y_, const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
          const OptionalTensor& A_, const OptionalTensor& B_, double scaling, const OptionalTensor& values_,
          const OptionalTensor& crow_, const OptionalTensor& col_, int64_t first, bool transposed,
          bool indices_checked) {
  const Argument y("y", y_), x("x", x_), weight("weight", weight_), bias("bias", bias_), A("lora_A", A_);
  const Argument B("lora_B", B_), values("values", values_), crow("crow", crow_), col("col", col_);
  if (!indices_checked) expect_memory({&y}, {&x, &weight, &bias, &A, &B, &values, &crow, &col});
  for (const Argument* matrix : {&y, &x, &weight}) matrix->expect_dim(2), matrix->expect_dtype(FLOAT32, "float32");
  expect_tokens(x, x.size(0));
  const int64_t features = y.size(1), rows = weight.size(0), columns = weight.size(1);
  Gemm p{};
  p.tokens = x.size(0);
  p.y = y.result(p.tokens, features);
  p.x = x.matrix(p.tokens, transposed ? rows : columns);
  if (bias) p.bias = bias.floats(features);
  p.transposed = transposed;
  p.weight = transposed
                 ? strip_of(weight, A, B, scaling, values, crow, col, 0, rows, first, features, indices_checked)
                 : strip_of(weight, A, B, scaling, values, crow, col, first, features, 0, columns, indices_checked);
  if (!y.empty()) kernels().gemm(p);
}

}  // namespace
}  // namespace rosa

// With indices_checked the caller answers for what lies in the index tensors, for the structure, and for results that
// share no memory with other arguments.
#define ROSA_LOW_RANK "Tensor? lora_A, Tensor? lora_B, float scaling, "
#define ROSA_SPARSE "Tensor? values, Tensor? crow, Tensor? col, "
#define ROSA_DROPOUT "Tensor? seed, int threshold, float scale, "
#define ROSA_CHECKED "bool indices_checked=False"

STABLE_TORCH_LIBRARY(rosa_kernels_cpu, m) {
  m.def("decode(Tensor x, Tensor? weight, Tensor? bias, "  //
        ROSA_LOW_RANK ROSA_SPARSE "int out_features, " ROSA_DROPOUT ROSA_CHECKED ") -> Tensor");
  m.def("forward(Tensor(a!) y, Tensor x, Tensor? weight, Tensor? bias, "  //
        ROSA_LOW_RANK ROSA_SPARSE "int structure, " ROSA_DROPOUT          //
        "bool bfloat16_adapters, bool fresh_y=False, " ROSA_CHECKED ") -> ()");
  m.def(
      "backward(Tensor(a!)? dx, Tensor(b!)? dA, Tensor(c!)? dB, Tensor(d!)? dvalues, "  //
      "Tensor dy, Tensor x, Tensor? weight, "                                           //
      ROSA_LOW_RANK ROSA_SPARSE                                                         //
      "Tensor? ccol, Tensor? row, Tensor? permutation, int structure, " ROSA_DROPOUT    //
      "bool bfloat16_adapters, " ROSA_CHECKED ") -> ()");
  m.def("merge(Tensor(a!) out, Tensor weight, "  //
        ROSA_LOW_RANK ROSA_SPARSE "int first_row, int first_column, " ROSA_CHECKED ") -> ()");
  m.def("gemm(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, "  //
        ROSA_LOW_RANK ROSA_SPARSE "int first, bool transposed, " ROSA_CHECKED ") -> ()");
  m.def("intel_processor() -> bool");
  m.def("x86_bfloat16() -> bool");
  m.def("constants() -> str");
  m.def("instruction_set() -> str");
  m.def("instruction_sets() -> str");
  m.def("build_info() -> str");
}

// For every kind of tensor: those that the operators refuse, they refuse by name.
STABLE_TORCH_LIBRARY_IMPL(rosa_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("decode", TORCH_BOX(&rosa::decode));
  m.impl("forward", TORCH_BOX(&rosa::forward));
  m.impl("backward", TORCH_BOX(&rosa::backward));
  m.impl("merge", TORCH_BOX(&rosa::merge));
  m.impl("gemm", TORCH_BOX(&rosa::gemm));
  m.impl("intel_processor", TORCH_BOX(&rosa::intel_processor));
  m.impl("x86_bfloat16", TORCH_BOX(&rosa::x86_bfloat16));
  m.impl("constants", TORCH_BOX(&rosa::constants));
  m.impl("instruction_set", TORCH_BOX(&rosa::instruction_set));
  m.impl("instruction_sets", TORCH_BOX(&rosa::instruction_sets));
  m.impl("build_info", TORCH_BOX(&rosa::build_info));
}
