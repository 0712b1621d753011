// Kernels with a fault each, and sound ones beside them, to see that the emulation and the sanitizers tell them apart:
// test_faults.py runs them.
#include <string>

#include "cuda/platform.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr int THREADS = 64;

// Sums a warp's numbers after a block turned them round: every means of exchange, used rightly.
__global__ void sound(float* out, int) {
  __shared__ float numbers[THREADS];
  ROSA_DYNAMIC_SHARED(float, dynamic);
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  dynamic[threadIdx.x] = numbers[THREADS - 1 - threadIdx.x];
  __syncwarp();
  float sum = dynamic[threadIdx.x ^ 1];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (__ballot_sync(0xffffffffu, threadIdx.x % 2) != 0xaaaaaaaau) sum = -1;
  out[threadIdx.x] = sum;
}

__global__ void divergent_barrier(float* out, int) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void incomplete_shuffle(float* out, int) {
  float x = 0;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  __syncthreads();
  out[threadIdx.x] = x;
}

__global__ void shuffle_from_a_missing_lane(float* out, int) {
  float x = 0;
  if (threadIdx.x % 32 < 7) x = __shfl_xor_sync(0x7fu, x, 1);
  out[threadIdx.x] = x;
}

__global__ void shuffle_from_an_exited_lane(float* out, int) {
  if (threadIdx.x % 32 == 31) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
}

__global__ void not_in_its_mask(float* out, int) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

__global__ void mma_without_a_lane(float* out, int) {
  if (threadIdx.x == 5) return;
  const uint32_t a[4] = {}, b[2] = {};
  float acc[4] = {};
  rosa::mma<__half>(acc, a, b);
  out[threadIdx.x] = acc[0];
}

__global__ void uninitialised_static(float* out, int) {
  __shared__ float numbers[THREADS];
  const float before = numbers[threadIdx.x];
  numbers[threadIdx.x] = 1;
  out[threadIdx.x] = before;
}

__global__ void uninitialised_dynamic(float* out, int) {
  ROSA_DYNAMIC_SHARED(float, numbers);
  const float before = numbers[threadIdx.x];
  numbers[threadIdx.x] = 1;
  out[threadIdx.x] = before;
}

// far = THREADS: one past the end.
__global__ void past_static_shared(float* out, int far) {
  __shared__ float numbers[THREADS];
  float* p = numbers;
  p[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x ? 0 : far];
}

__global__ void past_dynamic_shared(float* out, int far) {
  ROSA_DYNAMIC_SHARED(float, numbers);
  numbers[threadIdx.x ? threadIdx.x : far] = 0;
  out[threadIdx.x] = 0;
}

__global__ void past_a_row_of_shared(float* out, int far) {
  __shared__ float numbers[2][THREADS];
  numbers[0][threadIdx.x ? threadIdx.x : far] = 0;
  out[threadIdx.x] = 0;
}

__global__ void past_global(float* out, int far) { out[threadIdx.x ? threadIdx.x : far] = 0; }

__global__ void misaligned_vector(float* out, int) {
  const uint4 raw = *reinterpret_cast<const uint4*>(out + 1);
  out[threadIdx.x] = static_cast<float>(raw.x);
}

__global__ void missing_syncthreads(float* out, int) {
  __shared__ float numbers[THREADS];
  numbers[threadIdx.x] = 1;
  out[threadIdx.x] = numbers[THREADS - 1 - threadIdx.x];
}

// A shuffle orders no memory.
__global__ void missing_syncwarp(float* out, int) {
  __shared__ float numbers[THREADS];
  numbers[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  const float other = __shfl_xor_sync(0xffffffffu, 1.0f, 2);
  out[threadIdx.x] = numbers[threadIdx.x ^ 1] + other;
}

__global__ void missing_barrier_before_reuse(float* out, int) {
  __shared__ float numbers[THREADS];
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    numbers[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    sum += numbers[THREADS - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

#define KERNEL(name) {#name, name}
constexpr struct {
  const char* name;
  void (*kernel)(float*, int);
} KERNELS[] = {
    KERNEL(sound),
    KERNEL(divergent_barrier),
    KERNEL(incomplete_shuffle),
    KERNEL(shuffle_from_a_missing_lane),
    KERNEL(shuffle_from_an_exited_lane),
    KERNEL(not_in_its_mask),
    KERNEL(mma_without_a_lane),
    KERNEL(uninitialised_static),
    KERNEL(uninitialised_dynamic),
    KERNEL(past_static_shared),
    KERNEL(past_dynamic_shared),
    KERNEL(past_a_row_of_shared),
    KERNEL(past_global),
    KERNEL(misaligned_vector),
    KERNEL(missing_syncthreads),
    KERNEL(missing_syncwarp),
    KERNEL(missing_barrier_before_reuse),
};

// The first warp: acc (16, 8) += a (16, 16) b (16, 8), all row-major.
template <typename T>
__global__ void multiply(float* acc, const uint16_t* a, const uint16_t* b) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; };
  uint32_t a_fragment[4], b_fragment[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* from = a + (g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8;
    a_fragment[i] = pair(from[0], from[1]);
    sums[i] = acc[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const uint16_t* from = b + (2 * q + i * 8) * 8 + g;
    b_fragment[i] = pair(from[0], from[8]);
  }
  rosa::mma<T>(sums, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) acc[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

// (thread, block) of each thread of the grid in the order in which they end.
__global__ void order(int* out, int* next) {
  const int at = atomicAdd(next, 1);
  out[2 * at] = static_cast<int>(threadIdx.x);
  out[2 * at + 1] = static_cast<int>(blockIdx.x);
}

// What f throws, or what CUDA says of the launch.
template <typename F>
const char* outcome(F f) {
  static std::string text;
  try {
    f();
    text = cudaGetErrorString(cudaGetLastError());
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

}  // namespace

// The named kernel on one block of THREADS threads; out: THREADS floats.
EXPORTED const char* run(const char* name, float* out) {
  for (const auto& entry : KERNELS)
    if (std::string(entry.name) == name)
      return outcome(
          [&] { ROSA_LAUNCH(entry.kernel, dim3(1), dim3(THREADS), THREADS * sizeof(float), nullptr, out, THREADS); });
  return "no such kernel";
}

// `sound` with such a grid, block and dynamic shared memory, after allowing it so much (0: the default).
EXPORTED const char* launch(const unsigned* grid, const unsigned* block, size_t shared, int allowed, float* out) {
  return outcome([&] {
    if (cudaFuncSetAttribute(sound, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed) != cudaSuccess) return;
    ROSA_LAUNCH(sound, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared, nullptr, out, 0);
  });
}

EXPORTED const char* multiply_bfloat16(float* acc, const uint16_t* a, const uint16_t* b) {
  return outcome([&] { ROSA_LAUNCH(multiply<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, acc, a, b); });
}

EXPORTED const char* multiply_half(float* acc, const uint16_t* a, const uint16_t* b) {
  return outcome([&] { ROSA_LAUNCH(multiply<__half>, dim3(1), dim3(32), 0, nullptr, acc, a, b); });
}

EXPORTED const char* order_of(unsigned blocks, unsigned threads, int* out) {
  int next = 0;
  return outcome([&] { ROSA_LAUNCH(order, dim3(blocks), dim3(threads), 0, nullptr, out, &next); });
}

EXPORTED void widen_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __bfloat162float({from[i]});
}

EXPORTED void widen_half(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __half2float({from[i]});
}

EXPORTED void round_to_bfloat16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __float2bfloat16_rn(from[i]).bits;
}

EXPORTED void round_to_half(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __float2half_rn(from[i]).bits;
}
