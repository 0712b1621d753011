#define ROSA_ISA portable
#include "simd_portable.h"

#include "kernel_table.h"

namespace rosa {
extern const Kernels kernels_portable;
const Kernels kernels_portable = {
    "portable", portable::few_tokens, portable::forward, portable::backward, portable::merge, portable::product};
}  // namespace rosa
