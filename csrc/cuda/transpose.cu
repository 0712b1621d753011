// xᵀ, for kernels that read x at S's columns: the epilogue where shared memory is too small, and sddmm. Each number is
// moved once.
#include "cuda/device_functions.h"
#include "cuda/launch.h"

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

cudaError_t transpose(const Transpose& c, cudaStream_t stream) {
  if (c.features == 0 || c.padded_tokens == 0) return cudaSuccess;
  const TransposeOperands operands{c.tokens, c.features, c.out.stride, c.x.stride, is_aligned(c.out), is_aligned(c.x)};
  const dim3 grid = grid_of(c.padded_tokens / TRANSPOSE_TILE * ceil_div(c.features, TRANSPOSE_TILE));
  dispatch_dtype(c.x.dtype, [&](auto number) {
    using T = decltype(number);
    ROSA_LAUNCH(transpose_kernel<T>, grid, dim3(TRANSPOSE_THREADS), 0, stream, static_cast<T*>(c.out.data),
                static_cast<const T*>(c.x.data), operands);
  });
  return cudaGetLastError();
}

}  // namespace rosa
