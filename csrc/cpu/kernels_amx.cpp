#if defined(__x86_64__)
#include "kernels.h"
extern const rosa::Kernels* const rosa::kernels_amx;
const rosa::Kernels* const rosa::kernels_amx = nullptr;
#endif
