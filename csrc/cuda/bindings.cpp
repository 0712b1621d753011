// torch.ops.rosa_kernels_cuda.*: the CUDA kernels behind PyTorch's stable ABI. rosa_kernels/functional.py has checked a
// user's arguments, and rosa_kernels/backends/cuda/bindings.py, the only caller, has allocated the results. The checks
// here are assertions.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "cuda/kernels.h"

namespace rosa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "float32, bfloat16 or float16");
      return Dtype::float16;
  }
}

Matrix matrix_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), "a matrix of unit column stride");
  return {t.data_ptr(), t.stride(0), dtype_of(t)};
}

Matrix matrix_of(const OptionalTensor& t) { return t ? matrix_of(*t) : Matrix{}; }

void* contiguous_data(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "a contiguous tensor");
  return t.data_ptr();
}

float* floats_of(const OptionalTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "float32");
  return static_cast<float*>(contiguous_data(*t));
}

const int32_t* ints_of(const OptionalTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int, "int32");
  return static_cast<const int32_t*>(contiguous_data(*t));
}

PackedEntry* packed_entries_of(const OptionalTensor& t) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long, "packed entries, as int64");
  return static_cast<PackedEntry*>(contiguous_data(*t));
}

Dropout dropout_of(const OptionalTensor& seed, int64_t threshold, double scale) {
  if (!seed) return {};
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "one int64 seed");
  return {static_cast<const int64_t*>(seed->data_ptr()), static_cast<uint64_t>(threshold), static_cast<float>(scale)};
}

int splits_of(const OptionalTensor& parts) { return parts ? static_cast<int>(parts->size(0)) : 1; }

void transpose_op(Tensor out, const Tensor x) {
  run("transpose", transpose, {x.size(0), x.size(1), out.size(1), matrix_of(out), matrix_of(x)}, x);
}

void gather_columns_op(Tensor out, const Tensor x, const OptionalTensor col, const OptionalTensor crow,
                       int64_t row_length) {
  const int64_t rows = crow ? crow->size(0) - 1 : 0;
  run("gather_columns", gather_columns,
      {x.size(0), out.size(1), matrix_of(out), matrix_of(x), ints_of(col), ints_of(crow), rows, row_length}, x);
}

void pack_entries_op(Tensor packed_entries, const Tensor col, const OptionalTensor permutation, const Tensor values) {
  STD_TORCH_CHECK(packed_entries.numel() >= col.numel() + ENTRY_PADDING, "room for ENTRY_PADDING more entries");
  run("pack_entries", pack_entries,
      {col.numel(), packed_entries_of(packed_entries), ints_of(col), ints_of(permutation), contiguous_data(values),
       dtype_of(values)},
      values);
}

void shrink_op(Tensor H, const Tensor x, const Tensor A, const OptionalTensor seed, int64_t threshold, double scale,
               OptionalTensor parts) {
  run("shrink", shrink,
      {x.size(0), x.size(1), A.size(0), matrix_of(x), matrix_of(A), contiguous_data(H),
       dropout_of(seed, threshold, scale), splits_of(parts), floats_of(parts)},
      x);
}

void lora_grad_op(Tensor out, const Tensor z, const Tensor H, double scaling, const OptionalTensor seed,
                  int64_t threshold, double scale, OptionalTensor parts) {
  STD_TORCH_CHECK(out.scalar_type() == H.scalar_type(), "out and H of one dtype");
  run("lora_grad", lora_grad,
      {z.size(0), z.size(1), out.size(1), matrix_of(z), contiguous_data(H), dtype_of(H), out.data_ptr(), out.stride(0),
       out.stride(1), static_cast<float>(scaling), dropout_of(seed, threshold, scale), splits_of(parts),
       floats_of(parts)},
      z);
}

void epilogue_op(Tensor y, bool accumulate, const OptionalTensor H, const OptionalTensor B, double scaling,
                 const OptionalTensor seed, int64_t threshold, double scale, const OptionalTensor crow,
                 const OptionalTensor packed_entries, const OptionalTensor x, const OptionalTensor x_transposed,
                 const OptionalTensor row_products, int64_t in_features, int64_t multiprocessors) {
  Epilogue e{};
  e.tokens = y.size(0);
  e.in_features = in_features;
  e.out_features = y.size(1);
  e.y = matrix_of(y);
  e.accumulate = accumulate;
  if (H) {
    STD_TORCH_CHECK(B && H->scalar_type() == B->scalar_type(), "H and B of one dtype");
    e.r = B->size(1);
    e.H = contiguous_data(*H);
    e.B = B->data_ptr();
    e.B_dtype = dtype_of(*B);
    e.stride_o = B->stride(0);
    e.stride_k = B->stride(1);
  }
  e.scaling = static_cast<float>(scaling);
  e.dropout = dropout_of(seed, threshold, scale);
  e.crow = ints_of(crow);
  e.packed_entries = packed_entries_of(packed_entries);
  e.x = matrix_of(x);
  e.x_transposed = matrix_of(x_transposed);
  e.row_products = floats_of(row_products);
  e.rows = row_products ? row_products->size(1) : 0;
  e.multiprocessors = static_cast<int>(multiprocessors);
  run("epilogue", epilogue, e, y);
}

void sddmm_op(Tensor out, const Tensor dy_transposed, const Tensor x_transposed, const Tensor crow, const Tensor col,
              OptionalTensor parts) {
  run("sddmm", sddmm,
      {x_transposed.size(1), dy_transposed.size(0), out.numel(), contiguous_data(out), dtype_of(out),
       matrix_of(dy_transposed), matrix_of(x_transposed), ints_of(crow), ints_of(col), splits_of(parts),
       floats_of(parts)},
      out);
}

void gather_entries_op(Tensor out, const Tensor matrix, const Tensor crow, const Tensor col) {
  STD_TORCH_CHECK(out.scalar_type() == matrix.scalar_type(), "out and the matrix of one dtype");
  run("gather_entries", gather_entries,
      {matrix.size(0), out.numel(), contiguous_data(out), matrix_of(matrix), ints_of(crow), ints_of(col)}, out);
}

void densify_op(Tensor out, const OptionalTensor weight, const Tensor values, const Tensor crow, const Tensor col) {
  run("densify", densify,
      {out.size(0), out.size(1), matrix_of(out), matrix_of(weight), ints_of(crow), ints_of(col),
       contiguous_data(values), dtype_of(values)},
      out);
}

std::string build_info_op() { return build_info(); }

}  // namespace
}  // namespace rosa

STABLE_TORCH_LIBRARY(rosa_kernels_cuda, m) {
  m.def("transpose(Tensor(a!) out, Tensor x) -> ()");
  m.def("gather_columns(Tensor(a!) out, Tensor x, Tensor? col, Tensor? crow, int row_length) -> ()");
  m.def("pack_entries(Tensor(a!) packed_entries, Tensor col, Tensor? permutation, Tensor values) -> ()");
  m.def("shrink(Tensor(a!) H, Tensor x, Tensor A, Tensor? seed, int threshold, float scale, Tensor(b!)? parts) -> ()");
  m.def(
      "lora_grad(Tensor(a!) out, Tensor z, Tensor H, float scaling, "
      "Tensor? seed, int threshold, float scale, Tensor(b!)? parts) -> ()");
  m.def(
      "epilogue(Tensor(a!) y, bool accumulate, Tensor? H, Tensor? B, float scaling, "
      "Tensor? seed, int threshold, float scale, Tensor? crow, Tensor? packed_entries, "
      "Tensor? x, Tensor? x_transposed, Tensor? row_products, int in_features, int multiprocessors) -> ()");
  m.def(
      "sddmm(Tensor(a!) out, Tensor dy_transposed, Tensor x_transposed, "
      "Tensor crow, Tensor col, Tensor(b!)? parts) -> ()");
  m.def("gather_entries(Tensor(a!) out, Tensor matrix, Tensor crow, Tensor col) -> ()");
  m.def("densify(Tensor(a!) out, Tensor? weight, Tensor values, Tensor crow, Tensor col) -> ()");
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
