// The gradient of S's values: out[e] = Σ_t dy[t, row of e] x[t, col[e]]. Where S is denser, a library GEMM of all of
// dyᵀ x and gather_entries (gather.cu) are faster.
//
// The kernel reads dy and x transposed, so that tokens are next to each other. A block computes 64 entries, whatever
// rows they are in, so that a long row does not hold up others. A warp has 8 neighbouring entries, and each lane takes
// 16 bytes of tokens at a time. The tokens are split among blocks, and split_k.h adds the splits. The cost is reading x
// from L2 once for each entry; dy is read once for each row of the 8 entries.
#include "cuda/binary_search.h"
#include "cuda/split_k.h"

namespace rosa {

constexpr int SDDMM_ENTRIES = 8;  // those of a warp
constexpr int SDDMM_WARPS = SDDMM_BLOCK_ENTRIES / SDDMM_ENTRIES;

// Tokens that a warp takes at once. Splits begin at multiples of it.
template <typename T>
constexpr int SDDMM_STEP = WARP * Vector<T>::SIZE;

// The fields of Sddmm that the kernel reads. `tokens` is the number of tokens in one split.
struct SddmmOperands {
  int64_t padded_tokens, out_features, nnz, tokens;
  int64_t dy_stride, x_stride;
  const int32_t* crow;
  const int32_t* col;
};

// Widens neighbouring numbers. bf16 is the upper half of fp32, so that one instruction widens each.
template <typename T, int N>
__device__ __forceinline__ void widen(float (&out)[N], const T (&in)[N]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    uint32_t pairs[N / 2];
    memcpy(pairs, in, sizeof(in));
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = widened(in[i]);
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
    widen(dy_numbers, dy_vector.at);
#pragma unroll
    for (int j = 0; j < SDDMM_ENTRIES; ++j) {
      if (j > 0 && row[j] != row[j - 1]) {
        dy_vector = load_vector(dy + row[j] * s.dy_stride + token, SIZE, true);
        widen(dy_numbers, dy_vector.at);
      }
      float x_numbers[SIZE];
      widen(x_numbers, x_vector[j].at);
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

namespace {

template <typename T, typename O>
void launch_sddmm(O* out, const Sddmm& s, cudaStream_t stream) {
  const int64_t tokens = ceil_div(ceil_div(s.padded_tokens, s.splits), SDDMM_STEP<T>) * SDDMM_STEP<T>;
  const SddmmOperands operands{s.padded_tokens, s.out_features, s.nnz, tokens, s.dy.stride, s.x.stride, s.crow, s.col};
  const dim3 grid = grid_of(ceil_div(s.nnz, SDDMM_BLOCK_ENTRIES), s.splits);
  ROSA_LAUNCH((sddmm_kernel<T, O>), grid, dim3(SDDMM_WARPS * WARP), 0, stream, out, static_cast<const T*>(s.dy.data),
              static_cast<const T*>(s.x.data), operands);
}

}  // namespace

cudaError_t sddmm(const Sddmm& s, cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  if (!is_aligned(s.dy) || !is_aligned(s.x)) return cudaErrorInvalidValue;  // not as transpose lays them out
  dispatch_dtype(s.x.dtype, [&](auto number) {
    using T = decltype(number);
    if (s.splits > 1) return launch_sddmm<T, float>(s.parts, s, stream);
    dispatch_dtype(s.out_dtype, [&](auto result) {
      using O = decltype(result);
      launch_sddmm<T, O>(static_cast<O*>(s.out), s, stream);
    });
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || s.splits <= 1) return error;
  return add_parts({s.out, s.out_dtype, 1, 1, 1, 1.0f}, s.parts, s.nnz, 1, s.splits, stream);
}

}  // namespace rosa
