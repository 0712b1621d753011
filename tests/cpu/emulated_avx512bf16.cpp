#define ROSA_ISA emulated_avx512bf16
#define ROSA_OTHERS (*kernels_portable)
#define ROSA_LANES 16
#include "emulated_pairs.h"
//
#include "cpu/dense/bf16_dot_avx512.h"
//
#include "cpu/isa_table_bf16.h"

namespace rosa {
extern const KernelTable emulated_avx512bf16_kernels;
const KernelTable emulated_avx512bf16_kernels = {"avx512bf16",
                                                 emulated_avx512bf16::decode,
                                                 emulated_avx512bf16::forward,
                                                 emulated_avx512bf16::backward,
                                                 emulated_avx512bf16::merge,
                                                 emulated_avx512bf16::gemm,
                                                 emulated_avx512bf16::MULTIPLIES_WEIGHT};
}  // namespace rosa
