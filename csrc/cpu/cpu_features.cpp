// Which kernels this processor and its system run.
#include "cpu/common/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rosa {
namespace {

#if defined(__x86_64__)
// Bit of a CPUID register (0 to 3: EAX, EBX, ECX, EDX): __builtin_cpu_supports of older compilers does not know these
// names.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int which, int bit) {
  unsigned registers[4] = {};
  if (!__get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3])) return false;
  return registers[which] >> bit & 1;
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && cpuid_bit(7, 1, 0, 5); }
bool has_amx() { return has_avx512bf16() && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24); }  // AMX-BF16, AMX-TILE

// Linux saves the tiles' 8 KiB only for processes that ask for it: Documentation/arch/x86/xstate.rst.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

Supported find_supported() {
  Supported found = {{}, 0, ""};
#if defined(__x86_64__)
  const auto add = [&](bool has, const KernelTable* kernels) {
    if (has && kernels) found.kernels[found.count++] = kernels;
  };
  if (!kernels_avx2)
    found.left_out = "; without avx2, avx512, avx512bf16 and amx, which the compiler does not know";
  else if (!kernels_avx512)
    found.left_out = "; without avx512, avx512bf16 and amx, which the compiler does not know";
  else if (!kernels_avx512bf16)
    found.left_out = "; without avx512bf16 and amx, which the compiler does not know";
  else if (!kernels_amx)
    found.left_out = "; without amx, which the compiler does not know";
  const bool permitted = kernels_amx && has_amx() && tiles_permitted();
  if (kernels_amx && has_amx() && !permitted) found.left_out = "; without amx, whose tiles the system does not permit";
  add(permitted, kernels_amx);
  add(has_avx512bf16(), kernels_avx512bf16);
  add(has_avx512(), kernels_avx512);
  add(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2);
#endif
  found.kernels[found.count++] = kernels_portable;
  return found;
}

}  // namespace

const Supported& supported_kernels() {
  static const Supported supported = find_supported();
  return supported;
}

bool intel_processor() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool x86_bfloat16() {
#if defined(__x86_64__)
  return has_avx512bf16();  // every processor with AMX-BF16 has it too
#else
  return false;
#endif
}

}  // namespace rosa
