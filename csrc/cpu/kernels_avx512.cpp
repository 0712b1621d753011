#if defined(__x86_64__)
#define ROSA_ISA avx512
#include "simd_avx512.h"

#include "kernel_table.h"

namespace rosa {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = {
    "avx512", avx512::few_tokens, avx512::forward, avx512::backward, avx512::merge, avx512::product};
}  // namespace rosa
#endif
