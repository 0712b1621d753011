#include "cuda/kernels.h"

#define ROSA_TEXT_OF(...) #__VA_ARGS__
#define ROSA_TEXT(...) ROSA_TEXT_OF(__VA_ARGS__)

namespace rosa {

const char* build_info() {
#ifdef ROSA_EMULATED
  return "emulated on the CPU";
#else
  return "nvcc " ROSA_TEXT(__CUDACC_VER_MAJOR__) "." ROSA_TEXT(__CUDACC_VER_MINOR__) ", kernels for " ROSA_TEXT(
      __CUDA_ARCH_LIST__);
#endif
}

}  // namespace rosa
