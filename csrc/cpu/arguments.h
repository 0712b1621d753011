// The tensors of a direct call as pointers that the kernels may follow, or a refusal that names the argument. What is
// checked here takes no time that grows with sizes; index_checks.h reads what lies in the index tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/common/kernels.h"

namespace rosa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Every size is below it, or what sizes are multiplied by would not fit in 64 bits. Features must also fit in int32,
// as the indices of S do.
constexpr int64_t MOST_TOKENS = int64_t(1) << 40, MOST_FEATURES = (int64_t(1) << 31) - 1;

[[noreturn]] __attribute__((noinline, cold)) void refuse(const std::string& words) {
  throw std::runtime_error("rosa_kernels_cpu: " + words);
}
void refuse_fault(const std::string& fault) {
  if (!fault.empty()) refuse(fault);
}
[[noreturn]] __attribute__((noinline, cold)) void refuse(const char* name, const std::string& words) {
  refuse(std::string(name) + ": " + words);
}

const int32_t FLOAT32 = aoti_torch_dtype_float32(), BFLOAT16 = aoti_torch_dtype_bfloat16();
const int32_t FLOAT16 = aoti_torch_dtype_float16(), FLOAT64 = aoti_torch_dtype_float64();
const int32_t CPU = aoti_torch_device_type_cpu(), INT32 = aoti_torch_dtype_int32(), INT64 = aoti_torch_dtype_int64();

class Argument {
 public:
  const char* const name;

  // The tensor must outlive the argument.
  Argument(const char* name, const Tensor& tensor) : Argument(name, &tensor) {}
  Argument(const char* name, const OptionalTensor& tensor) : Argument(name, tensor ? &*tensor : nullptr) {}
  explicit operator bool() const { return tensor_; }
  const Tensor& tensor() const { return *tensor_; }

  int64_t dim() const { return dim_; }
  const int64_t* sizes() const { return sizes_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  bool empty() const {
    for (int64_t i = 0; i < dim_; ++i)
      if (sizes_[i] == 0) return true;
    return false;
  }

  void expect_dim(int64_t dim) const {
    if (dim_ != dim) refuse(name, "expected " + std::to_string(dim) + " dimensions, got " + std::to_string(dim_));
  }
  void expect_sizes(int64_t count) const {
    if (dim_ != 1 || sizes_[0] != count) refuse(name, "expected size " + in_brackets(&count, 1) + got_sizes());
  }
  void expect_sizes(int64_t rows, int64_t columns) const {
    if (dim_ == 2 && sizes_[0] == rows && sizes_[1] == columns) return;
    const int64_t expected[] = {rows, columns};
    refuse(name, "expected sizes " + in_brackets(expected, 2) + got_sizes());
  }
  void expect_dtype(int32_t dtype, const char* words) const {
    if (dtype_ != dtype) refuse(name, std::string("expected ") + words + ", got " + dtype_name());
  }

  bool is(ScalarType dtype) const { return dtype_ == (dtype == ScalarType::Float ? FLOAT32 : BFLOAT16); }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim_ - 1; i >= 0 && !empty(); expected *= sizes_[i--])
      if (sizes_[i] != 1 && strides_[i] != expected) return false;
    return true;
  }

  // The dtypes that adapters and their values come in.
  void expect_floating() const {
    if (dtype_ == FLOAT32 || dtype_ == BFLOAT16 || dtype_ == FLOAT16 || dtype_ == FLOAT64) return;
    refuse(name, "expected float32, bfloat16, float16 or float64, got " + dtype_name());
  }
  Dtype dtype() const {
    if (dtype_ != FLOAT32 && dtype_ != BFLOAT16) refuse(name, "expected float32 or bfloat16, got " + dtype_name());
    return dtype_ == FLOAT32 ? Dtype::float32 : Dtype::bfloat16;
  }
  Dtype dtype_as(const Argument& other) const {
    if (dtype() != other.dtype()) refuse(name, "expected the dtype of " + std::string(other.name));
    return dtype();
  }

  // A matrix of unit column stride.
  Matrix matrix(int64_t rows, int64_t columns) const {
    expect_sizes(rows, columns);
    const bool any = rows && columns;
    if (any && columns > 1 && strides_[1] != 1) refuse(name, "expected unit column stride, got " + stride_words(1));
    return {data(), strides_[0]};
  }
  // One that a kernel writes: its rows lie apart.
  Matrix result(int64_t rows, int64_t columns) const {
    const Matrix m = matrix(rows, columns);
    if (rows > 1 && columns && m.stride < columns)
      refuse(name, "expected rows that do not overlap, got stride " + stride_words(0));
    return m;
  }

  // Contiguous numbers of these sizes.
  template <class... Sizes>
  const float* floats(Sizes... sizes) const {
    return expect_sizes(sizes...), expect_dtype(FLOAT32, "float32"), static_cast<const float*>(numbers());
  }
  const int32_t* ints(int64_t count) const {
    return expect_sizes(count), expect_dtype(INT32, "int32"), static_cast<const int32_t*>(numbers());
  }
  template <class... Sizes>
  const void* numbers_as(const Argument& other, Sizes... sizes) const {
    return expect_sizes(sizes...), dtype_as(other), numbers();
  }

  void* data() const {
    void* data;
    expect(aoti_torch_get_data_ptr(tensor_->get(), &data), DENSE);
    return data;
  }

  // Resizing a storage leaves the sizes of its tensors as they were.
  void expect_stored() const {
    if (!tensor_ || empty()) return;
    int64_t bytes, offset;
    expect(aoti_torch_get_storage_size(tensor_->get(), &bytes), DENSE);
    expect(aoti_torch_get_storage_offset(tensor_->get(), &offset), DENSE);
    if ((offset + extent()) * element_size() > bytes)
      refuse(name, "expected a storage that holds it, got one of " + std::to_string(bytes) + " bytes");
  }
  // Whether a byte between the first and the last one of this argument is between those of the other.
  bool overlaps(const Argument& other) const {
    if (!tensor_ || !other.tensor_ || empty() || other.empty()) return false;
    const char *mine = (const char*)data(), *others = (const char*)other.data();
    return mine < others + other.extent() * other.element_size() && others < mine + extent() * element_size();
  }

  std::string dtype_name() const { return torch::headeronly::toString(tensor_->scalar_type()); }

 private:
  Argument(const char* name, const Tensor* tensor) : name(name), tensor_(tensor) {
    if (!tensor) return;
    const AtenTensorHandle handle = tensor->get();
    int32_t device;
    expect(aoti_torch_get_device_type(handle, &device), "a tensor, got None");
    if (device != CPU) refuse(name, "expected a tensor on the CPU");
    expect(aoti_torch_get_dim(handle, &dim_), DENSE);
    expect(aoti_torch_get_sizes(handle, &sizes_), DENSE);
    expect(aoti_torch_get_strides(handle, &strides_), DENSE);
    expect(aoti_torch_get_dtype(handle, &dtype_), DENSE);
  }

  // Sparse and opaque tensors have no strides, or no storage, and PyTorch answers with an error.
  static constexpr const char* DENSE = "a dense tensor";
  void expect(AOTITorchError answer, const char* words) const {
    if (answer != AOTI_TORCH_SUCCESS) refuse(name, std::string("expected ") + words);
  }

  // Elements from the first one to the last one.
  int64_t extent() const {
    int64_t last = 0;
    for (int64_t i = 0; i < dim_; ++i) last += (sizes_[i] - 1) * strides_[i];
    return last + 1;
  }
  int64_t element_size() const { return dtype_ == INT64 ? 8 : dtype_ == BFLOAT16 ? 2 : 4; }

  const void* numbers() const {
    if (!contiguous()) refuse(name, "expected a contiguous tensor");
    return data();
  }

  static std::string in_brackets(const int64_t* numbers, int64_t count) {
    std::string words = "(";
    for (int64_t i = 0; i < count; ++i) words += (i ? ", " : "") + std::to_string(numbers[i]);
    return words + ")";
  }
  std::string got_sizes() const { return ", got " + in_brackets(sizes_, dim_); }
  std::string stride_words(int64_t i) const { return std::to_string(strides_[i]); }

  const Tensor* tensor_;  // null where the call leaves the argument out
  int64_t dim_ = 0, *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0;
};

void expect_tokens(const Argument& argument, int64_t tokens) {
  if (tokens > MOST_TOKENS) refuse(argument.name, "expected at most 2^40 tokens, got " + std::to_string(tokens));
}
void expect_features(const Argument& argument, int64_t features) {
  if (features > MOST_FEATURES)
    refuse(argument.name, "expected fewer than 2^31 features, got " + std::to_string(features));
}
// (tokens, features)
void expect_tokens_and_features(const Argument& argument) {
  argument.expect_dim(2);
  expect_tokens(argument, argument.size(0));
  expect_features(argument, argument.size(1));
}
// The tokens of x (..., in_features), at most a block.
int64_t tokens_of_a_block(const Argument& x) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    if (x.size(i) == 0) return 0;
    if (tokens > BLOCK_TOKENS / x.size(i)) refuse(x.name, "expected at most 64 tokens");
    tokens *= x.size(i);
  }
  return tokens;
}
// (out_features, in_features)
void expect_weight(const Argument& argument) {
  argument.expect_dim(2);
  expect_features(argument, argument.size(0));
  expect_features(argument, argument.size(1));
}

// Every argument from the first one on is there, or none is.
void expect_together(std::initializer_list<const Argument*> arguments) {
  const Argument& first = **arguments.begin();
  for (const Argument* other : arguments)
    if (bool(*other) != bool(first))
      refuse(other->name, std::string("expected ") + (first ? "a tensor" : "None") + " as for " + first.name);
}

// The memory of each argument is there, and the results, which a kernel writes while it reads the others, lie apart.
void expect_memory(std::initializer_list<const Argument*> results, std::initializer_list<const Argument*> others) {
  for (const auto* list : {&results, &others})
    for (const Argument* argument : *list) argument->expect_stored();
  for (auto result = results.begin(); result != results.end(); ++result) {
    for (auto other = results.begin(); other != result; ++other)
      if ((*result)->overlaps(**other)) refuse((*result)->name, std::string("expected no memory of ") + (*other)->name);
    for (const Argument* other : others)
      if ((*result)->overlaps(*other)) refuse((*result)->name, std::string("expected no memory of ") + other->name);
  }
}

Dropout dropout_of(const Argument& seed, int64_t threshold, double scale) {
  if (threshold < 0 || threshold > (int64_t(1) << 32))
    refuse("threshold", "expected a number from 0 to 2^32, got " + std::to_string(threshold));
  if (!seed) return {};
  seed.expect_dtype(INT64, "int64");
  for (int64_t i = 0; i < seed.dim(); ++i)
    if (seed.size(i) != 1) refuse("seed", "expected one number");
  return {true, *static_cast<const uint64_t*>(seed.data()), static_cast<uint64_t>(threshold),
          static_cast<float>(scale)};
}

int64_t rank_of(const Argument& A) {
  A.expect_dim(2);
  const int64_t r = A.size(0);
  if (r < 1 || r > MOST_FEATURES) refuse(A.name, "expected 1 to 2^31 - 1 rows, got " + std::to_string(r));
  return r;
}

LowRank low_rank_of(const Argument& A, const Argument& B, double scaling, int64_t in_features, int64_t out_features,
                    bool bfloat16 = false) {
  expect_together({&A, &B});
  if (!A) return {};
  const int64_t r = rank_of(A);
  return {r, A.floats(r, in_features), B.floats(out_features, r), static_cast<float>(scaling), bfloat16};
}

}  // namespace
}  // namespace rosa
