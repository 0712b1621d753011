// torch.ops.rosa_kernels_gpu.*: LoRA by library GEMMs alone, without dropout and in one dtype. Each op is one call from
// Python for what would be three to seven, and host time is what limits a small GPU call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gpu/low_rank.h"

namespace rosa {
namespace {

enum class Gradient { x, A, B };  // the bits of needs

// The GEMMs are called past PyTorch's dispatcher, which would refuse what does not fit or lies on several devices.
class Expected {
 public:
  explicit Expected(const Tensor& x) : dtype_(x.scalar_type()), device_(x.get_device_index()), on_cpu_(x.is_cpu()) {
    STD_TORCH_CHECK(x.is_cpu() || x.is_cuda(), "rosa_kernels_gpu: x: expected a tensor on a CPU or a GPU");
    STD_TORCH_CHECK(x.dim() >= 1, "rosa_kernels_gpu: x: expected at least one dimension");
    like_x("x", x);
  }

  void matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "rosa_kernels_gpu: ", name,
                    ": expected (", rows, ", ", columns, ")");
    like_x(name, t);
  }

  void like_x(const char* name, const Tensor& t) const {
    int32_t layout = 0;
    check_shim(aoti_torch_get_layout(t.get(), &layout));
    STD_TORCH_CHECK(t.scalar_type() == dtype_ && t.is_cpu() == on_cpu_ && t.is_cuda() != on_cpu_ &&
                        t.get_device_index() == device_ && layout == aoti_torch_layout_strided(),
                    "rosa_kernels_gpu: ", name, ": expected a dense tensor of the dtype and the device of x");
  }

 private:
  ScalarType dtype_;
  int32_t device_;
  bool on_cpu_;
};

// (y = x Wᵀ + b + scaling · H Bᵀ, H = x Aᵀ); H is undefined unless it is kept.
std::tuple<Tensor, Tensor> lora(const Tensor x, const Tensor weight, const OptionalTensor bias, const Tensor lora_A,
                                const Tensor lora_B, double scaling, bool keep_H) {
  const Expected expected(x);
  const Tensor x2 = as_matrix(x);
  const int64_t out_features = lora_B.size(0), r = lora_A.size(0);
  expected.matrix("weight", weight, out_features, x2.size(1));
  expected.matrix("lora_A", lora_A, r, x2.size(1));
  expected.matrix("lora_B", lora_B, out_features, r);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == out_features, "rosa_kernels_gpu: bias: expected (",
                    out_features, ",)");
    expected.like_x("bias", *bias);
  }
  const Tensor H = library_H(x2, lora_A);
  Tensor y = empty_matrix(x, x2.size(0), out_features);
  add_product(y, false, bias, first_columns(H, r), transposed(lora_B), scaling);
  add_product(y, true, std::nullopt, x2, transposed(weight), 1);
  return {x.dim() == 2 ? y : reshaped(y, sizes_with_features(x, out_features)), keep_H ? H : Tensor()};
}

// dx, dlora_A and dlora_B; those that are not needed are undefined.
std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor dy, const Tensor x, const OptionalTensor weight,
                                                 const Tensor lora_A, const Tensor lora_B, const OptionalTensor kept_H,
                                                 double scaling, int64_t needs) {
  const auto need = [&](Gradient gradient) { return (needs >> static_cast<int>(gradient) & 1) != 0; };
  const Expected expected(x);
  const Tensor dy2 = as_matrix(dy), x2 = as_matrix(x);
  const int64_t T = x2.size(0), r = lora_A.size(0), out_features = dy2.size(1);
  expected.matrix("dy", dy2, T, out_features);
  expected.matrix("lora_A", lora_A, r, x2.size(1));
  expected.matrix("lora_B", lora_B, out_features, r);
  if (weight) expected.matrix("weight", *weight, out_features, x2.size(1));
  if (kept_H) expected.matrix("H", *kept_H, T, padded_rank(r));
  Tensor dx, dA, dB, dH;
  if (need(Gradient::A) || need(Gradient::x)) {
    dH = empty_matrix(dy, T, r);
    gemm(dH, dy2, lora_B);
  }
  if (need(Gradient::B)) {
    const Tensor H = kept_H ? *kept_H : library_H(x2, lora_A);
    dB = empty_matrix(lora_B, lora_B.size(0), r);
    gemm(dB, dB, transposed(dy2), first_columns(H, r), 0, scaling);
  }
  if (need(Gradient::A)) {
    dA = empty_matrix(lora_A, r, lora_A.size(1));
    gemm(dA, dA, transposed(dH), x2, 0, scaling);
  }
  if (need(Gradient::x)) {
    dx = empty_matrix(dy, T, x2.size(1));
    gemm(dx, dx, dH, lora_A, 0, scaling);
    if (weight) gemm(dx, dx, dy2, *weight, 1, 1);
    if (x.dim() != 2) dx = reshaped(dx, sizes_with_features(x, x2.size(1)));
  }
  return {dx, dA, dB};
}

bool serves_cuda() { return has_cuda_gemms(); }

}  // namespace
}  // namespace rosa

STABLE_TORCH_LIBRARY(rosa_kernels_gpu, m) {
  m.def(
      "lora(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, bool keep_H) "
      "-> (Tensor, Tensor)");
  m.def(
      "lora_backward(Tensor dy, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? H, float scaling, "
      "int needs) -> (Tensor, Tensor, Tensor)");
  m.def("serves_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(rosa_kernels_gpu, CompositeExplicitAutograd, m) {
  m.impl("lora", TORCH_BOX(&rosa::lora));
  m.impl("lora_backward", TORCH_BOX(&rosa::lora_backward));
  m.impl("serves_cuda", TORCH_BOX(&rosa::serves_cuda));
}
