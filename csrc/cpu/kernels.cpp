// The kernels of one instruction set. setup.py compiles this file once for each set, with ROSA_ISA as its name and with
// the compiler's options for it. Where the compiler does not know them it defines ROSA_ISA_UNKNOWN too and gives
// no options, and the set's table is null.
//
// The sets with bfloat16 instructions serve bfloat16 alone and leave the rest to AVX-512's kernels, which every
// processor with them runs too. AMX has been seen on one Xeon (bench/results) and is not tuned;
// tests/cpu/test_emulation.py runs its numbers, and AVX512-BF16's, on processors without them.
#ifndef ROSA_ISA
#define ROSA_ISA portable
#endif
#define ROSA_QUOTED_(name) #name
#define ROSA_QUOTED(name) ROSA_QUOTED_(name)
#define ROSA_JOINED_(a, b) a##b
#define ROSA_JOINED(a, b) ROSA_JOINED_(a, b)
#define ROSA_TABLE ROSA_JOINED(kernels_, ROSA_ISA)

#ifdef ROSA_ISA_UNKNOWN
#include "cpu/common/kernels.h"

namespace rosa {
const KernelTable* const ROSA_TABLE = nullptr;
}  // namespace rosa
#else
// clang-format off
#include ROSA_QUOTED(cpu/isa/ROSA_ISA.h)
// clang-format on
#ifdef ROSA_BF16_DOT
#define ROSA_OTHERS (*kernels_avx512)
#include ROSA_BF16_DOT
//
#include "cpu/isa_table_bf16.h"
#else
#include "cpu/isa_table.h"
#endif

namespace rosa {
static constexpr KernelTable table = {ROSA_QUOTED(ROSA_ISA),      ROSA_ISA::decode, ROSA_ISA::forward,
                                      ROSA_ISA::backward,         ROSA_ISA::merge,  ROSA_ISA::gemm,
                                      ROSA_ISA::MULTIPLIES_WEIGHT};
const KernelTable* const ROSA_TABLE = &table;
}  // namespace rosa
#endif
