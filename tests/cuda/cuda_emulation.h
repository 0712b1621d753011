// Runs the CUDA C++ kernels on the CPU, for correctness alone. tests/support/cuda_emulation.py compiles each .cu as
// C++17 with -DROSA_EMULATED and this folder among the includes. Here is what the kernels use of CUDA, and no more.
//
// A CUDA thread is a fiber. A block's threads take turns, and blocks follow each other, in a fixed order, which
// ROSA_EMULATION_ORDER=reversed in the environment turns round: code that leans on an order fails in one of them.
// Shared memory starts as NaNs (static arrays in a build without sanitizers). Barriers that not all threads reach,
// collectives that not all named lanes reach, and reads of a lane that takes no part are errors: the launch throws.
// ThreadSanitizer takes fibers for threads and sees accesses that no barrier orders, AddressSanitizer where arrays end.
#pragma once
#include "cuda_emulation_block.h"

#include <map>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#if defined(EMULATION_FILLS_STATIC_SHARED)
#define __shared__ static thread_local
#else
#define __shared__ static
#endif
#define threadIdx (cuda_emulation::current->index)
#define blockIdx (cuda_emulation::current->block->index)
#define blockDim (cuda_emulation::current->block->size)
#define gridDim (cuda_emulation::current->block->grid)

// Numbers and vectors

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// To nearest, ties to even; NaN as CUDA gives it.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000 | magnitude);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));  // subnormal ones too
}

inline __half __float2half_rn(float x) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
  uint32_t magnitude = __float_as_uint(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= __float_as_uint(65536.0f))
    magnitude = 0x7c00;
  else if (magnitude < __float_as_uint(0x1p-14f))  // subnormal: 0.5 has their spacing, and the addition rounds
    magnitude = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  else
    magnitude = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  return {static_cast<uint16_t>(sign | magnitude)};
}

// What one thread computes

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T atomicAdd(T* p, T x) {
  static_assert(std::is_integral_v<T>, "floats added in no fixed order give other bits each run");
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}

// What threads do together

#define EMULATION_HERE cuda_emulation::Site here = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(EMULATION_HERE) { cuda_emulation::barrier(here); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) {
  cuda_emulation::collective("__syncwarp", cuda_emulation::meet, mask, here);
}

namespace cuda_emulation {

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Site here) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a register or two");
  std::memcpy(&current->value, &value, sizeof(T));
  current->source = source;
  collective("shuffle", exchange, mask, here);
  std::memcpy(&value, &current->value, sizeof(T));
  return value;
}

inline unsigned segment(int width) { return current->lane & ~(static_cast<unsigned>(width) - 1); }

}  // namespace cuda_emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATION_HERE) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::segment(width) + lane % width, here);
}

// As in CUDA, a lane of a higher segment is not reached: the thread keeps its own value.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_HERE) {
  const unsigned own = cuda_emulation::current->lane, source = own ^ bits;
  return cuda_emulation::shuffle(mask, value, source < cuda_emulation::segment(width) + width ? source : own, here);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const unsigned own = cuda_emulation::current->lane, source = own + delta;
  return cuda_emulation::shuffle(mask, value, source < cuda_emulation::segment(width) + width ? source : own, here);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, EMULATION_HERE) {
  cuda_emulation::current->value = predicate;
  cuda_emulation::collective("vote", cuda_emulation::count_votes, mask, here);
  return static_cast<unsigned>(cuda_emulation::current->value);
}

namespace rosa {

inline float number(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float number(uint16_t bits, __half) { return __half2float({bits}); }

// The warp's product at once, from the registers of its lanes; their layout is stated in csrc/cuda/platform.h.
template <typename T>
void multiply_fragments(cuda_emulation::Thread* lanes, unsigned mask) {
  if (mask != 0xffffffffu) cuda_emulation::fail("mma: a lane of the warp has exited");
  float a[16][16], b[16][8], acc[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = lanes[lane];
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[g + i / 2 % 2 * 8][2 * q + i % 2 + i / 4 * 8] =
          number(static_cast<uint16_t>(own.a[i / 2] >> 16 * (i % 2)), T());
    for (int i = 0; i < 4; ++i) {
      b[2 * q + i % 2 + i / 2 * 8][g] = number(static_cast<uint16_t>(own.b[i / 2] >> 16 * (i % 2)), T());
      acc[g + i / 2 * 8][2 * q + i % 2] = own.acc[i];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) acc[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane].acc[i] = acc[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <typename T>
void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATION_HERE) {
  auto& own = *cuda_emulation::current;
  own.acc = acc;
  own.a = a;
  own.b = b;
  cuda_emulation::collective("mma", multiply_fragments<T>, 0xffffffffu, here);
}

}  // namespace rosa

// The runtime

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

namespace cuda_emulation {

constexpr int SHARED_MEMORY = 48 << 10;  // bytes that a kernel may ask for until cudaFuncSetAttribute allows more
constexpr int SHARED_MEMORY_OPTIN = 227 << 10;  // bytes that it may allow

inline std::map<const void*, int> shared_memory_of;  // kernel: bytes
inline cudaError_t last_error = cudaSuccess;

// What CUDA answers to a launch that it refuses. It also counts static shared memory and registers, unknown here.
inline cudaError_t launch_error(const void* kernel, dim3 grid, dim3 block, size_t shared) {
  const bool some = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  const bool block_fits =
      block.x <= 1024 && block.y <= 1024 && block.z <= 64 && static_cast<uint64_t>(block.x) * block.y * block.z <= 1024;
  if (!some || !block_fits || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto allowed = shared_memory_of.find(kernel);
  const int limit = std::max(SHARED_MEMORY, allowed == shared_memory_of.end() ? 0 : allowed->second);
  return shared > static_cast<size_t>(limit) ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t, A&&... arguments) {
  last_error = launch_error(reinterpret_cast<const void*>(kernel), grid, block, shared);
  if (last_error != cudaSuccess) return;
  run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, [&] { kernel(arguments...); });
}

}  // namespace cuda_emulation

#define ROSA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_emulation::launch((kernel), (grid), (block), (shared), (stream), __VA_ARGS__)
#define ROSA_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_emulation::current->block->shared)

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid argument";
  }
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_emulation::SHARED_MEMORY_OPTIN;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_emulation::SHARED_MEMORY_OPTIN) return cuda_emulation::last_error = cudaErrorInvalidValue;
  cuda_emulation::shared_memory_of[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
