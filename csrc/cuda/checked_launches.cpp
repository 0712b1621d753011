#include "cuda/checked_launches.h"

#include <torch/csrc/stable/accelerator.h>

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

}  // namespace

namespace checked {

void transpose(Tensor out, const Tensor x) {
  const Arguments args("transpose", "x", x);
  const Matrix of_x = args.matrix("x", x, ANY, ANY), of_out = args.matrix("out", out, x.size(1), ANY);
  args.expect_dtype_of("out", out, "x", x);
  args.expect(out.size(1) % TOKEN_PADDING == 0 && out.size(1) >= x.size(0), "out", "a multiple of ", TOKEN_PADDING,
              " columns, at least one for each row of x");
  run("transpose", rosa::transpose, {x.size(0), x.size(1), out.size(1), of_out, of_x}, x);
}

void gather_columns(Tensor out, const Tensor x, const OptionalTensor col, const OptionalTensor crow, int64_t row_length,
                    bool indices_checked) {
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
  run("gather_columns", rosa::gather_columns, g, x);
}

void pack_entries(Tensor packed_entries, const Tensor col, const OptionalTensor permutation, const Tensor values,
                  bool indices_checked) {
  const Arguments args("pack_entries", "values", values);
  args.expect_checked_indices(indices_checked);
  const int64_t nnz = values.numel();
  args.expect(nnz <= MOST_LENGTH, "values", "at most ", MOST_LENGTH, " entries");
  run("pack_entries", rosa::pack_entries,
      {nnz, args.packed_entries("packed_entries", packed_entries, nnz), args.indices("col", col, nnz),
       permutation ? args.indices("permutation", *permutation, nnz) : nullptr, args.numbers("values", values, nnz),
       args.dtype_of("values", values)},
      values);
}

void split_terms(Tensor out, const Tensor matrix, int64_t row_stride, int64_t term_stride) {
  const Arguments args("split_terms", "matrix", matrix);
  const void* const data = args.strided("matrix", matrix, ANY, ANY);
  args.expect(matrix.scalar_type() == ScalarType::Float, "matrix", "float32");
  args.expect(out.scalar_type() == ScalarType::BFloat16, "out", "bfloat16");
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  args.expect(row_stride >= 0 && term_stride >= 0, "row_stride and term_stride", "no negative number");
  const int64_t last = (rows - 1) * row_stride + (SPLIT_TERMS - 1) * term_stride + columns;
  void* const terms = args.numbers("out", out, ANY);
  args.expect(rows == 0 || columns == 0 || last <= out.numel(), "out", "room for ", last, " numbers");
  run("split_terms", rosa::split_terms,
      {rows, columns, static_cast<const float*>(data), matrix.stride(0), matrix.stride(1), terms, row_stride,
       term_stride},
      matrix);
}

void shrink(Tensor H, const Tensor x, const Tensor A, const OptionalTensor seed, int64_t threshold, double scale,
            OptionalTensor parts) {
  const Arguments args("shrink", "x", x);
  const Matrix of_x = args.matrix("x", x, ANY, ANY), of_A = args.matrix("A", A, ANY, x.size(1));
  const int64_t tokens = x.size(0), r = A.size(0), R = padded_rank(r);
  args.expect_dtype_of_or_float("A", A, "x", x);
  args.expect_dtype_of("H", H, "A", A);
  const auto [splits, data] = args.parts(parts, tokens * R);
  run("shrink", rosa::shrink,
      {tokens, x.size(1), r, of_x, of_A, args.aligned("H", H, tokens, R), args.dropout(seed, threshold, scale), splits,
       data},
      x);
}

void lora_grad(Tensor out, const Tensor z, const Tensor H, double scaling, const OptionalTensor seed, int64_t threshold,
               double scale, OptionalTensor parts) {
  const Arguments args("lora_grad", "z", z);
  const Matrix of_z = args.matrix("z", z, ANY, ANY);
  const int64_t tokens = z.size(0), features = z.size(1);
  void* const of_out = args.strided("out", out, features, ANY);
  const int64_t r = out.size(1), R = padded_rank(r);
  args.expect_dtype_of_or_float("H", H, "z", z);
  args.expect_dtype_of("out", out, "H", H);
  const auto [splits, data] = args.parts(parts, features * R);
  run("lora_grad", rosa::lora_grad,
      {tokens, features, r, of_z, args.aligned("H", H, tokens, R), args.dtype_of("H", H), of_out, out.stride(0),
       out.stride(1), static_cast<float>(scaling), args.dropout(seed, threshold, scale), splits, data},
      z);
}

namespace {

// S of an Epilogue, and x or what stands for it.
void add_S(Epilogue& e, const Arguments& args, const Tensor& y, const OptionalTensor& crow,
           const OptionalTensor& packed_entries, const OptionalTensor& x, const OptionalTensor& x_transposed,
           const OptionalTensor& row_products, int64_t row_terms) {
  args.expect(crow.has_value(), "crow", "a tensor beside packed_entries or row_products");
  args.expect(e.in_features > 0 && e.in_features <= MOST_LENGTH, "in_features", "1 to ", MOST_LENGTH);
  e.crow = args.indices("crow", *crow, e.out_features + 1);
  if (row_products) {
    e.row_products = args.floats("row_products", *row_products, e.tokens, ANY);
    args.expect(row_terms > 0 && row_products->size(1) % row_terms == 0, "row_products",
                "a multiple of row_terms columns");
    e.rows = row_products->size(1) / row_terms;
    e.row_stride = row_products->stride(0);
    e.row_terms = static_cast<int>(row_terms);
  }
  if (!packed_entries) return;
  args.expect(!row_products, "row_products", "none beside packed_entries");
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

}  // namespace

void epilogue(Tensor y, bool accumulate, const OptionalTensor bias, const OptionalTensor H, const OptionalTensor B,
              double scaling, const OptionalTensor seed, int64_t threshold, double scale, const OptionalTensor crow,
              const OptionalTensor packed_entries, const OptionalTensor x, const OptionalTensor x_transposed,
              const OptionalTensor row_products, int64_t row_terms, int64_t in_features, int64_t multiprocessors,
              bool indices_checked) {
  const Arguments args("epilogue", "y", y);
  Epilogue e{};
  e.y = args.matrix("y", y, ANY, ANY);
  e.tokens = y.size(0);
  e.in_features = in_features;
  e.out_features = y.size(1);
  e.accumulate = accumulate;
  if (bias) {
    e.bias = args.numbers("bias", *bias, e.out_features);
    args.expect_dtype_of("bias", *bias, "y", y);
  }
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
    add_S(e, args, y, crow, packed_entries, x, x_transposed, row_products, row_terms);
  }
  args.expect(0 < multiprocessors && multiprocessors <= 65535, "multiprocessors", "1 to 65535");
  e.multiprocessors = static_cast<int>(multiprocessors);
  run("epilogue", rosa::epilogue, e, y);
}

void sddmm(Tensor out, const Tensor dy_transposed, const Tensor x_transposed, const Tensor crow, const Tensor col,
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
  run("sddmm", rosa::sddmm,
      {padded_tokens, out_features, nnz, args.numbers("out", out, nnz), args.dtype_of("out", out), dy, x,
       args.indices("crow", crow, out_features + 1), args.indices("col", col, nnz), splits, data},
      out);
}

void gather_entries(Tensor out, const Tensor matrix, const Tensor crow, const Tensor col, bool indices_checked) {
  const Arguments args("gather_entries", "matrix", matrix);
  args.expect_checked_indices(indices_checked);
  const Matrix of_matrix = args.matrix("matrix", matrix, ANY, ANY);
  const int64_t rows = matrix.size(0), nnz = out.numel();
  args.expect_dtype_of("out", out, "matrix", matrix);
  args.expect(nnz <= MOST_LENGTH, "out", "at most ", MOST_LENGTH, " entries");
  run("gather_entries", rosa::gather_entries,
      {rows, nnz, args.numbers("out", out, nnz), of_matrix, args.indices("crow", crow, rows + 1),
       args.indices("col", col, nnz)},
      out);
}

void densify(Tensor out, const OptionalTensor weight, const Tensor values, const Tensor crow, const Tensor col,
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
  run("densify", rosa::densify,
      {rows, columns, of_out, of_weight, args.indices("crow", crow, rows + 1), args.indices("col", col, nnz),
       args.numbers("values", values, nnz), args.dtype_of("values", values)},
      out);
}

}  // namespace checked
}  // namespace rosa
