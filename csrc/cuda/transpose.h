// Columns of x. transpose writes all of them as rows, for kernels that read x at S's columns: the epilogue where shared
// memory is too small, and sddmm. gather_columns collects a few, those that whole rows or columns of S need, for
// library GEMMs. Both move each number once.
#pragma once
#include "cuda/binary_search.h"
#include "cuda/device_functions.h"
#include "cuda/kernels.h"

namespace rosa {

constexpr int TRANSPOSE_TILE = TOKEN_PADDING;  // tokens, and as many features
constexpr int TRANSPOSE_THREADS = 256;

// What the kernel reads of a Transpose.
struct TransposeOperands {
  int64_t tokens, features;
  int64_t out_stride, x_stride;
  bool out_aligned, x_aligned;
};

// A block turns a tile of 64 tokens by 64 features. Blocks next to each other have the same tokens.
template <typename T>
__global__ void __launch_bounds__(TRANSPOSE_THREADS) transpose_kernel(T* out, const T* x, TransposeOperands c) {
  constexpr int SIZE = Vector<T>::SIZE, VECTORS = TRANSPOSE_TILE / SIZE;
  constexpr int PER_WORD = 4 / sizeof(T), WORDS = TRANSPOSE_TILE / PER_WORD;  // PER_WORD tokens share 32 bits.
  // A row for each feature holds vectors of tokens. Vector v of feature f lies at v ^ (f / SIZE), so that neighbouring
  // lanes meet different banks.
  __shared__ uint4 tile[TRANSPOSE_TILE][VECTORS];
  const int64_t feature_tiles = (c.features + TRANSPOSE_TILE - 1) / TRANSPOSE_TILE;
  const int64_t first_token = blockIdx.x / feature_tiles * TRANSPOSE_TILE;
  const int64_t first_feature = blockIdx.x % feature_tiles * TRANSPOSE_TILE;
#pragma unroll
  for (int step = 0; step < WORDS * VECTORS / TRANSPOSE_THREADS; ++step) {
    const int at = step * TRANSPOSE_THREADS + threadIdx.x, word = at / VECTORS, feature = at % VECTORS * SIZE;
    Vector<T> v[PER_WORD];
#pragma unroll
    for (int t = 0; t < PER_WORD; ++t) {
      const int64_t token = first_token + word * PER_WORD + t;
      v[t] = load_vector(x + token * c.x_stride + first_feature + feature,
                         token < c.tokens ? c.features - first_feature - feature : 0, c.x_aligned);
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      T numbers[PER_WORD];
#pragma unroll
      for (int t = 0; t < PER_WORD; ++t) numbers[t] = v[t].at[i];
      uint4& vector = tile[feature + i][word / 4 ^ feature / SIZE];
      memcpy(reinterpret_cast<uint32_t*>(&vector) + word % 4, numbers, 4);
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < TRANSPOSE_TILE * VECTORS / TRANSPOSE_THREADS; ++step) {
    const int at = step * TRANSPOSE_THREADS + threadIdx.x, row = at / VECTORS, vector = at % VECTORS;
    const int64_t feature = first_feature + row;
    if (feature >= c.features) break;
    const uint4 raw = tile[row][vector ^ row / SIZE];
    Vector<T> v;
    memcpy(&v, &raw, 16);
    const int64_t token = first_token | vector * SIZE;  // This is a sum, but nvcc 13.0 splits 16-byte stores at a +.
    store_vector(out + feature * c.out_stride + token, v, SIZE, c.out_aligned);
  }
}

constexpr int GATHER_COLUMNS = WARP;  // one for each lane
constexpr int GATHER_WARPS = 8;
constexpr int GATHER_TOKENS = 8;  // those of a warp, whose loads are in flight together

// What the kernel reads of a GatherColumns.
struct GatherColumnsOperands {
  int64_t tokens, count;
  int64_t out_stride, x_stride;
  const int32_t* col;
  const int32_t* crow;
  int64_t rows, row_length;
};

// A block gathers 32 columns of 64 tokens. Blocks next to each other have the same tokens.
template <typename T>
__global__ void __launch_bounds__(GATHER_WARPS* WARP)
    gather_columns_kernel(T* out, const T* x, GatherColumnsOperands g) {
  __shared__ int64_t index[GATHER_COLUMNS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t column_tiles = (g.count + GATHER_COLUMNS - 1) / GATHER_COLUMNS;
  const int64_t p = blockIdx.x % column_tiles * GATHER_COLUMNS + lane;
  const int64_t first_token = (blockIdx.x / column_tiles * GATHER_WARPS + warp) * GATHER_TOKENS;
  if (warp == 0 && p < g.count) index[lane] = g.col ? g.col[p] : row_of_entry(g.crow, g.rows, p * g.row_length);
  __syncthreads();
  if (p >= g.count) return;
  const T* column = x + index[lane];
  T numbers[GATHER_TOKENS];
#pragma unroll
  for (int t = 0; t < GATHER_TOKENS; ++t)
    if (first_token + t < g.tokens) numbers[t] = column[(first_token + t) * g.x_stride];
#pragma unroll
  for (int t = 0; t < GATHER_TOKENS; ++t)
    if (first_token + t < g.tokens) out[(first_token + t) * g.out_stride + p] = numbers[t];
}

}  // namespace rosa
