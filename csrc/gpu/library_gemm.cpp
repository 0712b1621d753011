#include "gpu/library_gemm.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace rosa {
namespace {

struct Gemms {
  decltype(&aoti_torch_cpu_mm_out) mm_out;
  decltype(&aoti_torch_cpu_addmm_out) addmm_out;
};

// Those of the library that PyTorch has loaded for NVIDIA's or AMD's GPUs; both name their device "cuda".
Gemms find_cuda_gemms() {
  for (const char* name : {"libtorch_cuda.so", "libtorch_hip.so"})
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
      const Gemms found{reinterpret_cast<decltype(Gemms::mm_out)>(dlsym(library, "aoti_torch_cuda_mm_out")),
                        reinterpret_cast<decltype(Gemms::addmm_out)>(dlsym(library, "aoti_torch_cuda_addmm_out"))};
      if (found.mm_out && found.addmm_out) return found;
    }
  return {nullptr, nullptr};
}

const Gemms& cuda_gemms() {
  static const Gemms found = find_cuda_gemms();
  return found;
}

const Gemms& gemms_of(const Tensor& t) {
  static const Gemms cpu{aoti_torch_cpu_mm_out, aoti_torch_cpu_addmm_out};
  if (t.is_cpu()) return cpu;
  STD_TORCH_CHECK(has_cuda_gemms(), "rosa_kernels: this PyTorch has no aoti_torch_cuda_addmm_out to call");
  return cuda_gemms();
}

}  // namespace

bool has_cuda_gemms() { return cuda_gemms().mm_out != nullptr; }

void gemm(Tensor& out, const Tensor& a, const Tensor& b) {
  check_shim(gemms_of(out).mm_out(out.get(), a.get(), b.get()));
}

void gemm(Tensor& out, const Tensor& c, const Tensor& a, const Tensor& b, double beta, double alpha) {
  check_shim(gemms_of(out).addmm_out(out.get(), c.get(), a.get(), b.get(), beta, alpha));
}

Tensor fp32_product(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == ScalarType::Float || a.is_cpu()) {
    Tensor out = empty_matrix(a, a.size(0), b.size(1), ScalarType::Float);
    gemm(out, converted(a, ScalarType::Float), converted(b, ScalarType::Float));
    return out;
  }
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(ScalarType::Float)};
  check_shim(torch_call_dispatcher("aten::mm", "dtype", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace rosa
