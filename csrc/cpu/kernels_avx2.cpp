#if defined(__x86_64__)
#define ROSA_ISA avx2
#include "simd_avx2.h"

#include "kernel_table.h"

namespace rosa {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = {
    "avx2", avx2::few_tokens, avx2::forward, avx2::backward, avx2::merge, avx2::product};
}  // namespace rosa
#endif
