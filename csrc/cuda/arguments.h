// The arguments of torch.ops.rosa_kernels_cuda.*: each is checked before a launch, so that a kernel stays within the
// tensors that it was given, and a refusal names the argument. What a check costs does not depend on any size.
//
// The contents of crow, col, permutation and packed entries lie on the GPU, and reading them would have the CPU wait
// for it. So an op that goes by them asks its caller to have checked them.
#pragma once
#include "cuda/kernels.h"
#include "gpu/tensors.h"

namespace rosa {

constexpr int64_t ANY = -1;  // as a size that is expected

// Scratch memory for a sum in several splits.
struct Parts {
  int splits = 1;
  float* data = nullptr;
};

class Arguments {
 public:
  // All arguments lie on the GPU of `first`.
  Arguments(const char* op, const char* name, const Tensor& first) : op_(op), device_(first.get_device_index()) {
    expect_place(name, first);
  }

  template <typename... Words>
  void expect(bool fits, const char* name, const Words&... expected) const {
    STD_TORCH_CHECK(fits, "rosa_kernels_cuda.", op_, ": ", name, ": expected ", expected...);
  }

  void expect_checked_indices(bool indices_checked) const {
    STD_TORCH_CHECK(indices_checked, "rosa_kernels_cuda.", op_,
                    ": call torch.ops.rosa_kernels.*, which checks the indices. This op reads and writes wherever they "
                    "point; indices_checked=True says that its caller has checked them");
  }

  // (rows, columns) whose rows may be apart but have their numbers next to each other.
  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    expect_sizes(name, t, rows, columns);
    expect(t.size(1) <= 1 || t.stride(1) == 1, name, "the numbers of a row next to each other in memory");
    return {t.data_ptr(), t.stride(0), dtype_of(name, t)};
  }

  // A matrix, whose rows begin at multiples of 16 bytes.
  Matrix aligned_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    const Matrix m = matrix(name, t, rows, columns);
    expect(is_aligned(m), name, "rows that begin at multiples of 16 bytes");
    return m;
  }

  // (rows, columns) of any strides.
  void* strided(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    expect_sizes(name, t, rows, columns);
    return t.data_ptr();
  }

  // numel numbers of a dtype that the kernels compute, in one piece.
  void* numbers(const char* name, const Tensor& t, int64_t numel) const {
    dtype_of(name, t);
    return contiguous(name, t, numel);
  }

  // (rows, columns) in one piece that begins at a multiple of 16 bytes.
  void* aligned(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    expect_sizes(name, t, rows, columns);
    expect(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name, "memory that begins at a multiple of 16 bytes");
    return contiguous(name, t, ANY);
  }

  const int32_t* indices(const char* name, const Tensor& t, int64_t numel) const {
    expect(t.scalar_type() == ScalarType::Int, name, "int32");
    return static_cast<const int32_t*>(contiguous(name, t, numel));
  }

  PackedEntry* packed_entries(const char* name, const Tensor& t, int64_t nnz) const {
    expect(t.scalar_type() == ScalarType::Long, name, "int64");
    expect(t.numel() >= nnz + ENTRY_PADDING, name, "room for ", nnz, " entries and ", ENTRY_PADDING, " more");
    return static_cast<PackedEntry*>(contiguous(name, t, ANY));
  }

  const float* floats(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    expect_sizes(name, t, rows, columns);
    expect(t.scalar_type() == ScalarType::Float, name, "float32");
    return static_cast<const float*>(contiguous(name, t, ANY));
  }

  Parts parts(const OptionalTensor& t, int64_t numel) const {
    if (!t) return {};
    expect(t->scalar_type() == ScalarType::Float, "parts", "float32");
    expect(t->dim() > 0 && 0 < t->size(0) && t->size(0) <= 65535, "parts", "1 to 65535 splits");
    return {static_cast<int>(t->size(0)), static_cast<float*>(contiguous("parts", *t, t->size(0) * numel))};
  }

  Dropout dropout(const OptionalTensor& seed, int64_t threshold, double scale) const {
    if (!seed) return {};
    expect(seed->scalar_type() == ScalarType::Long, "seed", "int64");
    const void* data = contiguous("seed", *seed, 1);
    return {static_cast<const int64_t*>(data), static_cast<uint64_t>(threshold), static_cast<float>(scale)};
  }

  Dtype dtype_of(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return Dtype::float32;
      case ScalarType::BFloat16:
        return Dtype::bfloat16;
      default:
        expect(t.scalar_type() == ScalarType::Half, name, "float32, bfloat16 or float16");
        return Dtype::float16;
    }
  }

  void expect_dtype_of(const char* name, const Tensor& t, const char* other_name, const Tensor& other) const {
    expect(t.scalar_type() == other.scalar_type(), name, "the dtype of ", other_name);
  }

  void expect_dtype_of_or_float(const char* name, const Tensor& t, const char* other_name, const Tensor& other) const {
    expect(t.scalar_type() == other.scalar_type() || t.scalar_type() == ScalarType::Float, name, "the dtype of ",
           other_name, " or float32");
  }

 private:
  void expect_place(const char* name, const Tensor& t) const {
#ifdef ROSA_EMULATED
    expect(t.is_cpu(), name, "a tensor on the CPU, where the kernels are emulated");
#else
    expect(t.is_cuda() && t.get_device_index() == device_, name, "a tensor on GPU ", device_, ", as the others");
#endif
    int32_t layout = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
    expect(layout == aoti_torch_layout_strided(), name, "a dense tensor");
  }

  void expect_sizes(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    expect_place(name, t);
    expect(t.dim() == 2, name, "a matrix, got ", t.dim(), " dimensions");
    expect(rows == ANY || t.size(0) == rows, name, rows, " rows, got ", t.size(0));
    expect(columns == ANY || t.size(1) == columns, name, columns, " columns, got ", t.size(1));
    expect(t.size(0) <= MOST_LENGTH && t.size(1) <= MOST_LENGTH, name, "at most ", MOST_LENGTH, " rows and columns");
  }

  void* contiguous(const char* name, const Tensor& t, int64_t numel) const {
    expect_place(name, t);
    expect(t.is_contiguous(), name, "a contiguous tensor");
    expect(numel == ANY || t.numel() == numel, name, numel, " elements, got ", t.numel());
    return t.data_ptr();
  }

  const char* op_;
  int32_t device_;
};

}  // namespace rosa
