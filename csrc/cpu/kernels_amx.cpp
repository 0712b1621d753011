// Seen on one Xeon (bench/results), not tuned there; tests/test_cpu_emulation.py shows its numbers on other processors.
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__)
#define ROSA_ISA amx
#define ROSA_OTHERS kernels_avx512
#include "pairs_avx512bf16.h"
//
#include "tiles_amx.h"
//
#include "tile_products.h"
//
#include "pairs_table.h"

namespace rosa {
static constexpr Kernels table = {
    "amx", amx::few_tokens, amx::forward, amx::backward, amx::merge, amx::product,
    amx::SERVES_BASE};
extern const Kernels* const kernels_amx;
const Kernels* const kernels_amx = &table;
}  // namespace rosa
#elif defined(__x86_64__)
#include "kernels.h"
extern const rosa::Kernels* const rosa::kernels_amx;
const rosa::Kernels* const rosa::kernels_amx = nullptr;
#endif
