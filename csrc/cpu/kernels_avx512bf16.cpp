// Where no processor has these instructions, tests/test_cpu_emulation.py shows its numbers.
#if defined(__AVX512BF16__)
#define ROSA_ISA avx512bf16
#define ROSA_OTHERS kernels_avx512
#include "pairs_avx512bf16.h"
//
#include "pair_products.h"
//
#include "pairs_table.h"

namespace rosa {
static constexpr Kernels table = {
    "avx512bf16", avx512bf16::few_tokens, avx512bf16::forward, avx512bf16::backward, avx512bf16::merge, avx512bf16::product,
    avx512bf16::SERVES_BASE};
extern const Kernels* const kernels_avx512bf16;
const Kernels* const kernels_avx512bf16 = &table;
}  // namespace rosa
#elif defined(__x86_64__)
#include "kernels.h"
extern const rosa::Kernels* const rosa::kernels_avx512bf16;
const rosa::Kernels* const rosa::kernels_avx512bf16 = nullptr;
#endif
