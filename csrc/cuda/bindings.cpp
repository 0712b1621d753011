// torch.ops.rosa_kernels_cuda.*: the CUDA kernels behind PyTorch's stable ABI. The package calls them in
// rosa_kernels/backends/cuda/bindings.py, with a pattern's indices, which are checked when the pattern is made. Any
// other caller gets an error where arguments do not fit.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/arguments.h"

namespace rosa {
namespace {

#ifdef ROSA_EMULATED
struct CurrentStream {
  explicit CurrentStream(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
// Makes a tensor's device the current one for a launch, and knows PyTorch's current stream there.
struct CurrentStream {
  explicit CurrentStream(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};
#endif

template <typename Operation>
void run(const char* name, cudaError_t (*launch)(const Operation&, cudaStream_t), const Operation& operation,
         const Tensor& on_device) {
  const CurrentStream current(on_device);
  const cudaError_t error = launch(operation, current.stream);
  STD_TORCH_CHECK(error == cudaSuccess, "rosa_kernels: CUDA refused to launch ", name, ": ", cudaGetErrorString(error));
}

void transpose_op(Tensor out, const Tensor x) {
  const Arguments args("transpose", "x", x);
  const Matrix of_x = args.matrix("x", x, ANY, ANY), of_out = args.matrix("out", out, x.size(1), ANY);
  args.expect_dtype_of("out", out, "x", x);
  args.expect(out.size(1) % TOKEN_PADDING == 0 && out.size(1) >= x.size(0), "out", "a multiple of ", TOKEN_PADDING,
              " columns, at least one for each row of x");
  run("transpose", transpose, {x.size(0), x.size(1), out.size(1), of_out, of_x}, x);
}

void gather_columns_op(Tensor out, const Tensor x, const OptionalTensor col, const OptionalTensor crow,
                       int64_t row_length, bool indices_checked) {
  const Arguments args("gather_columns", "x", x);
  args.expect_checked_indices(indices_checked);
  GatherColumns g{};
  g.x = args.matrix("x", x, ANY, ANY);
  g.out = args.matrix("out", out, x.size(0), ANY);
  args.expect_dtype_of("out", out, "x", x);
  g.tokens = x.size(0);
  g.count = out.size(1);
  args.expect(col.has_value() != crow.has_value(), "col and crow", "one of them");
  if (col) g.col = args.indices("col", *col, g.count);
  if (crow) g.crow = args.indices("crow", *crow, ANY);
  g.rows = crow ? crow->numel() - 1 : 0;
  g.row_length = row_length;
  args.expect(g.rows >= 0, "crow", "at least one element");
  args.expect(0 <= row_length && row_length <= MOST_LENGTH, "row_length", "0 to ", MOST_LENGTH);
  run("gather_columns", gather_columns, g, x);
}

void pack_entries_op(Tensor packed_entries, const Tensor col, const OptionalTensor permutation, const Tensor values,
                     bool indices_checked) {
  const Arguments args("pack_entries", "values", values);
  args.expect_checked_indices(indices_checked);
  const int64_t nnz = values.numel();
  args.expect(nnz <= MOST_LENGTH, "values", "at most ", MOST_LENGTH, " entries");
  run("pack_entries", pack_entries,
      {nnz, args.packed_entries("packed_entries", packed_entries, nnz), args.indices("col", col, nnz),
       permutation ? args.indices("permutation", *permutation, nnz) : nullptr, args.numbers("values", values, nnz),
       args.dtype_of("values", values)},
      values);
}

int64_t padded_rank(int64_t r) { return (r + RANK_STEP - 1) / RANK_STEP * RANK_STEP; }

void shrink_op(Tensor H, const Tensor x, const Tensor A, const OptionalTensor seed, int64_t threshold, double scale,
               OptionalTensor parts) {
  const Arguments args("shrink", "x", x);
  const Matrix of_x = args.matrix("x", x, ANY, ANY), of_A = args.matrix("A", A, ANY, x.size(1));
  const int64_t tokens = x.size(0), r = A.size(0), R = padded_rank(r);
  args.expect_dtype_of_or_float("A", A, "x", x);
  args.expect_dtype_of("H", H, "A", A);
  const auto [splits, data] = args.parts(parts, tokens * R);
  run("shrink", shrink,
      {tokens, x.size(1), r, of_x, of_A, args.aligned("H", H, tokens, R), args.dropout(seed, threshold, scale), splits,
       data},
      x);
}

void lora_grad_op(Tensor out, const Tensor z, const Tensor H, double scaling, const OptionalTensor seed,
                  int64_t threshold, double scale, OptionalTensor parts) {
  const Arguments args("lora_grad", "z", z);
  const Matrix of_z = args.matrix("z", z, ANY, ANY);
  const int64_t tokens = z.size(0), features = z.size(1);
  void* const of_out = args.strided("out", out, features, ANY);
  const int64_t r = out.size(1), R = padded_rank(r);
  args.expect_dtype_of_or_float("H", H, "z", z);
  args.expect_dtype_of("out", out, "H", H);
  const auto [splits, data] = args.parts(parts, features * R);
  run("lora_grad", lora_grad,
      {tokens, features, r, of_z, args.aligned("H", H, tokens, R), args.dtype_of("H", H), of_out, out.stride(0),
       out.stride(1), static_cast<float>(scaling), args.dropout(seed, threshold, scale), splits, data},
      z);
}

// S of an Epilogue, and x or what stands for it.
void add_S(Epilogue& e, const Arguments& args, const Tensor& y, const OptionalTensor& crow,
           const OptionalTensor& packed_entries, const OptionalTensor& x, const OptionalTensor& x_transposed,
           const OptionalTensor& row_products) {
  args.expect(crow.has_value(), "crow", "a tensor beside packed_entries or row_products");
  args.expect(e.in_features > 0 && e.in_features <= MOST_LENGTH, "in_features", "1 to ", MOST_LENGTH);
  e.crow = args.indices("crow", *crow, e.out_features + 1);
  if (row_products) {
    e.row_products = args.floats("row_products", *row_products, e.tokens, ANY);
    e.rows = row_products->size(1);
  }
  if (!packed_entries) return;
  e.packed_entries = args.packed_entries("packed_entries", *packed_entries, 0);
  args.expect(x.has_value() != x_transposed.has_value(), "x and x_transposed", "one of them beside packed_entries");
  if (x) {
    e.x = args.matrix("x", *x, e.tokens, e.in_features);
    args.expect_dtype_of("x", *x, "y", y);
  } else {
    e.x_transposed = args.aligned_matrix("x_transposed", *x_transposed, e.in_features, ANY);
    args.expect_dtype_of("x_transposed", *x_transposed, "y", y);
    args.expect(x_transposed->size(1) % TOKEN_PADDING == 0 && x_transposed->size(1) >= e.tokens, "x_transposed",
                "a multiple of ", TOKEN_PADDING, " columns, at least one for each row of y");
  }
}

void epilogue_op(Tensor y, bool accumulate, const OptionalTensor H, const OptionalTensor B, double scaling,
                 const OptionalTensor seed, int64_t threshold, double scale, const OptionalTensor crow,
                 const OptionalTensor packed_entries, const OptionalTensor x, const OptionalTensor x_transposed,
                 const OptionalTensor row_products, int64_t in_features, int64_t multiprocessors,
                 bool indices_checked) {
  const Arguments args("epilogue", "y", y);
  Epilogue e{};
  e.y = args.matrix("y", y, ANY, ANY);
  e.tokens = y.size(0);
  e.in_features = in_features;
  e.out_features = y.size(1);
  e.accumulate = accumulate;
  args.expect(H.has_value() == B.has_value(), "H and B", "both or neither");
  if (H) {
    e.B = args.strided("B", *B, e.out_features, ANY);
    e.r = B->size(1);
    e.H = args.aligned("H", *H, e.tokens, padded_rank(e.r));
    args.expect_dtype_of_or_float("B", *B, "y", y);
    args.expect_dtype_of("H", *H, "B", *B);
    e.B_dtype = args.dtype_of("B", *B);
    e.stride_o = B->stride(0);
    e.stride_k = B->stride(1);
  }
  e.scaling = static_cast<float>(scaling);
  e.dropout = args.dropout(seed, threshold, scale);
  if (packed_entries || row_products) {
    args.expect_checked_indices(indices_checked);
    add_S(e, args, y, crow, packed_entries, x, x_transposed, row_products);
  }
  args.expect(0 < multiprocessors && multiprocessors <= 65535, "multiprocessors", "1 to 65535");
  e.multiprocessors = static_cast<int>(multiprocessors);
  run("epilogue", epilogue, e, y);
}

void sddmm_op(Tensor out, const Tensor dy_transposed, const Tensor x_transposed, const Tensor crow, const Tensor col,
              OptionalTensor parts, bool indices_checked) {
  const Arguments args("sddmm", "x_transposed", x_transposed);
  args.expect_checked_indices(indices_checked);
  const Matrix x = args.aligned_matrix("x_transposed", x_transposed, ANY, ANY);
  const int64_t padded_tokens = x_transposed.size(1), nnz = out.numel();
  const Matrix dy = args.aligned_matrix("dy_transposed", dy_transposed, ANY, padded_tokens);
  const int64_t out_features = dy_transposed.size(0);
  args.expect_dtype_of("dy_transposed", dy_transposed, "x_transposed", x_transposed);
  args.expect(padded_tokens % TOKEN_PADDING == 0, "x_transposed", "a multiple of ", TOKEN_PADDING, " columns");
  args.expect(nnz <= MOST_LENGTH, "out", "at most ", MOST_LENGTH, " entries");
  const auto [splits, data] = args.parts(parts, nnz);
  run("sddmm", sddmm,
      {padded_tokens, out_features, nnz, args.numbers("out", out, nnz), args.dtype_of("out", out), dy, x,
       args.indices("crow", crow, out_features + 1), args.indices("col", col, nnz), splits, data},
      out);
}

void gather_entries_op(Tensor out, const Tensor matrix, const Tensor crow, const Tensor col, bool indices_checked) {
  const Arguments args("gather_entries", "matrix", matrix);
  args.expect_checked_indices(indices_checked);
  const Matrix of_matrix = args.matrix("matrix", matrix, ANY, ANY);
  const int64_t rows = matrix.size(0), nnz = out.numel();
  args.expect_dtype_of("out", out, "matrix", matrix);
  args.expect(nnz <= MOST_LENGTH, "out", "at most ", MOST_LENGTH, " entries");
  run("gather_entries", gather_entries,
      {rows, nnz, args.numbers("out", out, nnz), of_matrix, args.indices("crow", crow, rows + 1),
       args.indices("col", col, nnz)},
      out);
}

void densify_op(Tensor out, const OptionalTensor weight, const Tensor values, const Tensor crow, const Tensor col,
                bool indices_checked) {
  const Arguments args("densify", "out", out);
  args.expect_checked_indices(indices_checked);
  const Matrix of_out = args.matrix("out", out, ANY, ANY);
  const int64_t rows = out.size(0), columns = out.size(1), nnz = values.numel();
  Matrix of_weight{};
  if (weight) {
    of_weight = args.matrix("weight", *weight, rows, columns);
    args.expect_dtype_of("weight", *weight, "out", out);
  }
  args.expect(nnz <= MOST_LENGTH, "values", "at most ", MOST_LENGTH, " entries");
  run("densify", densify,
      {rows, columns, of_out, of_weight, args.indices("crow", crow, rows + 1), args.indices("col", col, nnz),
       args.numbers("values", values, nnz), args.dtype_of("values", values)},
      out);
}

std::string build_info_op() { return build_info(); }

}  // namespace
}  // namespace rosa

STABLE_TORCH_LIBRARY(rosa_kernels_cuda, m) {
  m.def("transpose(Tensor(a!) out, Tensor x) -> ()");
  m.def(
      "gather_columns(Tensor(a!) out, Tensor x, Tensor? col, Tensor? crow, int row_length, "
      "bool indices_checked=False) -> ()");
  m.def(
      "pack_entries(Tensor(a!) packed_entries, Tensor col, Tensor? permutation, Tensor values, "
      "bool indices_checked=False) -> ()");
  m.def("shrink(Tensor(a!) H, Tensor x, Tensor A, Tensor? seed, int threshold, float scale, Tensor(b!)? parts) -> ()");
  m.def(
      "lora_grad(Tensor(a!) out, Tensor z, Tensor H, float scaling, "
      "Tensor? seed, int threshold, float scale, Tensor(b!)? parts) -> ()");
  m.def(
      "epilogue(Tensor(a!) y, bool accumulate, Tensor? H, Tensor? B, float scaling, "
      "Tensor? seed, int threshold, float scale, Tensor? crow, Tensor? packed_entries, "
      "Tensor? x, Tensor? x_transposed, Tensor? row_products, int in_features, int multiprocessors, "
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
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rosa_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("transpose", TORCH_BOX(&rosa::transpose_op));
  m.impl("gather_columns", TORCH_BOX(&rosa::gather_columns_op));
  m.impl("pack_entries", TORCH_BOX(&rosa::pack_entries_op));
  m.impl("shrink", TORCH_BOX(&rosa::shrink_op));
  m.impl("lora_grad", TORCH_BOX(&rosa::lora_grad_op));
  m.impl("epilogue", TORCH_BOX(&rosa::epilogue_op));
  m.impl("sddmm", TORCH_BOX(&rosa::sddmm_op));
  m.impl("gather_entries", TORCH_BOX(&rosa::gather_entries_op));
  m.impl("densify", TORCH_BOX(&rosa::densify_op));
  m.impl("build_info", TORCH_BOX(&rosa::build_info_op));
}
