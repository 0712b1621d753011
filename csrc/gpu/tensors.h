// Views of tensors and room for new ones, for host code that composes a GPU call. They are made past PyTorch's
// dispatcher, which would take about a microsecond for each.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

// PyTorch's words on the last error of its C shim, from 2.13 on; an older PyTorch prints them.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rosa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws with PyTorch's words where a function of its C shim failed.
inline void check_shim(AOTITorchError error) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const auto words = &torch_exception_get_what_without_backtrace;
  throw std::runtime_error(words ? words() : "rosa_kernels: a call of PyTorch failed, which has printed the reason");
}

namespace detail {

inline Tensor view(const Tensor& t, size_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  AtenTensorHandle made = nullptr;
  check_shim(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(dimensions), sizes, strides, offset, &made));
  return Tensor(made);
}

inline Tensor empty(const Tensor& like, size_t dimensions, const int64_t* sizes, const int64_t* strides,
                    ScalarType dtype) {
  int32_t device_type = 0;
  check_shim(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  check_shim(aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides, code, device_type,
                                      like.get_device_index(), &made));
  return Tensor(made);
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return strides;
}

}  // namespace detail

// A view of t's memory, a vector or a matrix, from its offset-th element on.
inline Tensor view(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                   int64_t offset = 0) {
  return detail::view(t, sizes.size(), sizes.begin(), strides.begin(), offset);
}

inline Tensor transposed(const Tensor& t) { return view(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }

inline Tensor first_columns(const Tensor& t, int64_t columns) {
  STD_TORCH_CHECK(columns <= t.size(1), "rosa_kernels: expected a matrix of at least ", columns, " columns, got ",
                  t.size(1));
  return columns == t.size(1) ? t : view(t, {t.size(0), columns}, {t.stride(0), t.stride(1)});
}

// A contiguous tensor of the same numbers in another shape of as many.
inline Tensor reshaped(const Tensor& contiguous, const std::vector<int64_t>& sizes) {
  return detail::view(contiguous, sizes.size(), sizes.data(), detail::contiguous_strides(sizes).data(), 0);
}

// (..., features) -> (T, features): a view where the strides allow it.
inline Tensor as_matrix(const Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t features = t.size(t.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) tokens *= t.size(i);
  if (t.is_contiguous()) return view(t, {tokens, features}, {features, 1});
  return torch::stable::reshape(t, {tokens, features});
}

// t's leading sizes, then features.
inline std::vector<int64_t> sizes_with_features(const Tensor& t, int64_t features) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i + 1 < t.dim(); ++i) sizes[i] = t.size(i);
  sizes.back() = features;
  return sizes;
}

// Room on like's device.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return detail::empty(like, sizes.size(), sizes.data(), detail::contiguous_strides(sizes).data(), dtype);
}

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return detail::empty(like, 2, sizes, strides, dtype);
}

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return empty_matrix(like, rows, columns, like.scalar_type());
}

inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor made = empty(like, sizes, dtype);
  return torch::stable::zero_(made);
}

// A copy in one piece and of a dtype, or t itself where it is that already.
inline Tensor contiguous(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && t.is_contiguous()) return t;
  Tensor copy = empty(t, sizes_with_features(t, t.size(t.dim() - 1)), dtype);
  return torch::stable::copy_(copy, t);
}

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : contiguous(t, dtype);
}

// The same matrix with neighbours in a row next to each other in memory, copied where they are not.
inline Tensor unit_stride(const Tensor& t) {
  if (t.size(1) <= 1 || t.stride(1) == 1) return t;
  if (t.numel() == 0) return empty_matrix(t, t.size(0), t.size(1));  // contiguous whatever its strides
  return contiguous(t, t.scalar_type());
}

}  // namespace rosa
