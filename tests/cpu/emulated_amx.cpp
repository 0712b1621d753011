#define ROSA_ISA emulated_amx
#define ROSA_OTHERS (*kernels_portable)
#define ROSA_LANES 16
#include "emulated_pairs.h"
//
#include "emulated_tiles.h"
//
#include "cpu/dense/bf16_dot_amx.h"
//
#include "cpu/isa_table_bf16.h"

namespace rosa {
extern const KernelTable emulated_amx_kernels;
const KernelTable emulated_amx_kernels = {"amx",
                                          emulated_amx::decode,
                                          emulated_amx::forward,
                                          emulated_amx::backward,
                                          emulated_amx::merge,
                                          emulated_amx::gemm,
                                          emulated_amx::MULTIPLIES_WEIGHT};
}  // namespace rosa
