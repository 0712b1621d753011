// In place of csrc/cpu/cpu_features.cpp: a processor whose instructions for bfloat16 are emulated.
#include "cpu/common/kernels.h"

namespace rosa {
extern const KernelTable emulated_amx_kernels, emulated_avx512bf16_kernels;

const Supported& supported_kernels() {
  static const Supported supported = {
      {&emulated_amx_kernels, &emulated_avx512bf16_kernels, kernels_portable}, 3, "; emulated"};
  return supported;
}

bool x86_bfloat16() { return true; }
bool intel_processor() { return false; }
}  // namespace rosa
