// The CUDA that the kernels use. Under ROSA_EMULATED the same sources run on the CPU: tests/cuda_emulation.h stands in.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef ROSA_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// T* name: the block's dynamic shared memory.
#define ROSA_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char rosa_dynamic_[]; \
  T* name = reinterpret_cast<T*>(rosa_dynamic_)
#define ROSA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)

namespace rosa {

// acc (16, 8) += a (16, 16) b (16, 8): the tensor core's mma.m16n8k16, whose fragments the PTX ISA lays out. Lane 4 g +
// q holds in a rows g, g + 8, g, g + 8 at columns 2q, 2q + 1 (twice), then 2q + 8, 2q + 9 (twice); in b rows 2q, 2q +
// 1, then 2q + 8, 2q + 9 of column g; in acc rows g, g, g + 8, g + 8 at columns 2q, 2q + 1, 2q, 2q + 1.
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
