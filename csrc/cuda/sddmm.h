// The gradient of S's values: out[e] = Σ_t dy[t, row of e] x[t, col[e]]. sddmm computes each entry's dot product.
// gather_entries only collects them from all of dyᵀ x, which a library GEMM made: that is faster for a dense S.
//
// sddmm reads dy and x transposed, so that tokens are next to each other. A block computes 64 entries, whatever rows
// they are in, so that a long row does not hold up others. A warp has 8 neighbouring entries, and each lane takes 16
// bytes of tokens at a time. The tokens are split among blocks, and split_k.h adds the splits. The cost is reading x
// from L2 once for each entry; dy is read once for each row of the 8 entries.
#pragma once
#include "cuda/binary_search.h"
#include "cuda/device_functions.h"
#include "cuda/kernels.h"

namespace rosa {

constexpr int SDDMM_ENTRIES = 8;  // those of a warp
constexpr int SDDMM_WARPS = SDDMM_BLOCK_ENTRIES / SDDMM_ENTRIES;

// Tokens that a warp takes at once. Splits begin at multiples of it.
template <typename T>
constexpr int SDDMM_STEP = WARP * Vector<T>::SIZE;

// What the kernel reads of an Sddmm. A split has so many `tokens`.
struct SddmmOperands {
  int64_t padded_tokens, out_features, nnz, tokens;
  int64_t dy_stride, x_stride;
  const int32_t* crow;
  const int32_t* col;
};

template <typename T>
__device__ __forceinline__ void widen(float (&numbers)[Vector<T>::SIZE], const Vector<T>& v) {
#pragma unroll
  for (int i = 0; i < Vector<T>::SIZE; ++i) numbers[i] = widened(v.at[i]);
}

// bf16 is the upper half of fp32, so that one instruction widens a number.
__device__ __forceinline__ void widen(float (&numbers)[8], const Vector<__nv_bfloat16>& v) {
  uint32_t pairs[4];
  memcpy(pairs, &v, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    numbers[2 * i] = __uint_as_float(pairs[i] << 16);
    numbers[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

// Adds a lane's share of the sums over tokens [first, end), both multiples of a vector.
template <typename T>
__device__ __forceinline__ void sum_products(float (&acc)[SDDMM_ENTRIES], const T* dy, const T* x,
                                             const SddmmOperands& s, const int (&row)[SDDMM_ENTRIES],
                                             const int (&column)[SDDMM_ENTRIES], int64_t first, int64_t end) {
  constexpr int SIZE = Vector<T>::SIZE;
  const T* x_row[SDDMM_ENTRIES];
#pragma unroll
  for (int j = 0; j < SDDMM_ENTRIES; ++j) x_row[j] = x + column[j] * s.x_stride;
  for (int64_t t = first + threadIdx.x % WARP * SIZE; first < end; first += SDDMM_STEP<T>, t += SDDMM_STEP<T>) {
    const int64_t token = min(t, end - SIZE);
    Vector<T> x_vector[SDDMM_ENTRIES];
#pragma unroll
    for (int j = 0; j < SDDMM_ENTRIES; ++j) x_vector[j] = load_vector(x_row[j] + token, SIZE, true);
    Vector<T> dy_vector = load_vector(dy + row[0] * s.dy_stride + token, SIZE, true);
    __syncwarp();  // The compiler must not put off any of these loads: all are to be in flight together.
    if (t >= end) break;
    float dy_numbers[SIZE];
    widen(dy_numbers, dy_vector);
#pragma unroll
    for (int j = 0; j < SDDMM_ENTRIES; ++j) {
      if (j > 0 && row[j] != row[j - 1]) {
        dy_vector = load_vector(dy + row[j] * s.dy_stride + token, SIZE, true);
        widen(dy_numbers, dy_vector);
      }
      float x_numbers[SIZE];
      widen(x_numbers, x_vector[j]);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) acc[j] += dy_numbers[i] * x_numbers[i];
    }
  }
}

// The grid has blocks of entries in x and splits of the tokens in y. The kernel writes out (splits, nnz).
template <typename T, typename O>
__global__ void __launch_bounds__(SDDMM_WARPS* WARP) sddmm_kernel(O* out, const T* dy, const T* x, SddmmOperands s) {
  const int lane = threadIdx.x % WARP;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * SDDMM_WARPS + threadIdx.x / WARP) * SDDMM_ENTRIES;
  if (first >= s.nnz) return;
  const int64_t entry = min(first + lane % SDDMM_ENTRIES, s.nnz - 1);
  const int row_of_lane = static_cast<int>(row_of_entry(s.crow, s.out_features, entry)), column_of_lane = s.col[entry];
  int row[SDDMM_ENTRIES], column[SDDMM_ENTRIES];
#pragma unroll
  for (int j = 0; j < SDDMM_ENTRIES; ++j) {
    row[j] = __shfl_sync(ALL_LANES, row_of_lane, j);
    column[j] = __shfl_sync(ALL_LANES, column_of_lane, j);
  }
  const int64_t first_token = blockIdx.y * s.tokens;
  float acc[SDDMM_ENTRIES] = {};
  sum_products(acc, dy, x, s, row, column, first_token, min(first_token + s.tokens, s.padded_tokens));
  float total = 0;
#pragma unroll
  for (int j = 0; j < SDDMM_ENTRIES; ++j) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) acc[j] += __shfl_xor_sync(ALL_LANES, acc[j], distance);
    if (lane == j) total = acc[j];
  }
  if (lane < SDDMM_ENTRIES && first + lane < s.nnz) out[blockIdx.y * s.nnz + first + lane] = rounded<O>(total);
}

constexpr int GATHER_ENTRIES_THREADS = 256;
constexpr int GATHER_ENTRIES_A_THREAD = 4;

// What the kernel reads of a GatherEntries.
struct GatherEntriesOperands {
  int64_t rows, nnz, stride;
  const int32_t* crow;
  const int32_t* col;
};

// A block gathers 1024 neighbouring entries. It first finds the rows of its first and last entry, between which each
// thread then searches.
template <typename T, typename O>
__global__ void __launch_bounds__(GATHER_ENTRIES_THREADS)
    gather_entries_kernel(O* out, const T* matrix, GatherEntriesOperands p) {
  constexpr int ENTRIES = GATHER_ENTRIES_THREADS * GATHER_ENTRIES_A_THREAD;
  __shared__ int64_t rows_of_block[2];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ENTRIES, end = min(first + ENTRIES, p.nnz);
  if (threadIdx.x < 2) rows_of_block[threadIdx.x] = row_of_entry(p.crow, p.rows, threadIdx.x ? end - 1 : first);
  __syncthreads();
  const int64_t first_row = rows_of_block[0], rows = rows_of_block[1] - first_row + 1;
#pragma unroll
  for (int i = 0; i < GATHER_ENTRIES_A_THREAD; ++i) {
    const int64_t e = first + i * GATHER_ENTRIES_THREADS + threadIdx.x;
    if (e >= end) break;
    const int64_t row = first_row + row_of_entry(p.crow + first_row, rows, e);
    out[e] = rounded<O>(widened(matrix[row * p.stride + p.col[e]]));
  }
}

}  // namespace rosa
