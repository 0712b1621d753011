// What the kernels use of CUDA. Under ROSA_EMULATED the same sources run on the CPU, and tests/cuda/cuda_emulation.h
// stands in for CUDA.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef ROSA_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares T* name, the block's dynamic shared memory.
#define ROSA_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char rosa_dynamic_[]; \
  T* name = reinterpret_cast<T*>(rosa_dynamic_)
#define ROSA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)

namespace rosa {

// acc (16, 8) += a (16, 16) b (16, 8) on the tensor cores, by the instruction mma.m16n8k16. The PTX ISA says which lane
// holds which numbers. Every kernel here calls a lane's group g = lane / 4 and its place in the group q = lane % 4:
// - a[0] and a[1] are rows g and g + 8 at columns 2q and 2q + 1; a[2] and a[3] the same rows at columns 2q + 8, 2q + 9.
// - b[0] is rows 2q and 2q + 1 of column g, b[1] rows 2q + 8 and 2q + 9.
// - acc[0] and acc[1] are row g at columns 2q and 2q + 1, acc[2] and acc[3] row g + 8.
template <typename T>
__device__ void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace rosa
#endif
