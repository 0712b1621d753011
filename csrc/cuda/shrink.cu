// H = dropout(x) Aᵀ for the forward, and dH = dy B for the backward, where dy stands for x and Bᵀ for A. The name is
// this field's: shrink takes many features to r, expand (in epilogue.h) takes r to many. x is large and A small, so
// that the cost is reading x once.
//
// A block computes 16 tokens by up to 64 ranks. The axis that is summed, the features, is split: first among the
// block's eight warps, which take turns at steps of 64 bytes, then among blocks. Both are added in order.
//
// The order of a sum over features is free. So a lane of an mma's fragment takes 8 features that lie next to each
// other, and 16-byte loads of x and A go straight into fragments, without shared memory.
#include "cuda/philox.h"
#include "cuda/split_k.h"

namespace rosa {

constexpr int SHRINK_WARPS = SHRINK_STEP_BYTES / (4 * 16);  // A warp takes 16 bytes in each of a token's four lanes.

// What the kernel reads of a Shrink.
struct ShrinkOperands {
  int64_t tokens, features, r;
  int64_t x_stride, A_stride;
  bool x_aligned, A_aligned;
  Dropout dropout;
};

// 8 neighbouring numbers of A (r, features) as operands of an mma of T: pairs[i][term] holds numbers 2 i and 2 i + 1.
template <typename T, typename A_t>
__device__ __forceinline__ void load_rank_pairs(uint32_t (&pairs)[4][TERMS<T, A_t>], const A_t* A, int64_t row,
                                                const ShrinkOperands& s, int64_t feature) {
  constexpr int SIZE = Vector<A_t>::SIZE;
#pragma unroll
  for (int first = 0; first < 8; first += SIZE) {
    const Vector<A_t> v = row_vector(A, row, s.r, s.A_stride, feature + first, s.features, s.A_aligned);
#pragma unroll
    for (int i = 0; i < SIZE; i += 2) packed_terms<T, A_t>(pairs[(first + i) / 2], v.at[i], v.at[i + 1]);
  }
}

// What a warp sums: 16 tokens from `token` on, ranks from `rank` on, and every stride-th step of features.
struct ShrinkTile {
  int64_t token, rank;
  int64_t step, stride, steps;
};

// Features in a step: each of a token's four lanes reads 16 bytes.
template <typename T>
constexpr int STEP = 4 * Vector<T>::SIZE;

// A warp's sums, which lie in shared memory.
template <int RANK_TILES>
using WarpSums = float[SHRINK_TOKENS][8 * RANK_TILES];

// Sums the warp's tile on the tensor cores.
template <typename T, typename A_t, int RANK_TILES>
__device__ __forceinline__ void shrink_on_tensor_cores(WarpSums<RANK_TILES>& sums, const T* x, const A_t* A,
                                                       const ShrinkOperands& s, const ShrinkTile& tile) {
  const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  const int64_t token[2] = {tile.token + g, tile.token + g + 8};
  const uint64_t seed = s.dropout.seed ? *s.dropout.seed : 0;
  float acc[RANK_TILES][4] = {};
  for (int64_t step = tile.step; step < tile.steps; step += tile.stride) {
    const int64_t feature = step * STEP<T> + 8 * q;
    uint32_t x_pairs[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector<T> v = row_vector(x, token[half], s.tokens, s.x_stride, feature, s.features, s.x_aligned);
      drop(v, s.dropout, seed, token[half], feature);
#pragma unroll
      for (int i = 0; i < 4; ++i) x_pairs[half][i] = packed(v.at[2 * i], v.at[2 * i + 1]);
    }
#pragma unroll
    for (int ranks = 0; ranks < RANK_TILES; ++ranks) {
      uint32_t pairs[4][TERMS<T, A_t>];
      load_rank_pairs<T, A_t>(pairs, A, tile.rank + 8 * ranks + g, s, feature);
#pragma unroll
      for (int term = 0; term < TERMS<T, A_t>; ++term) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // Each half of the step's 32 features is one mma.
          const uint32_t x_fragment[4] = {x_pairs[0][2 * half], x_pairs[1][2 * half], x_pairs[0][2 * half + 1],
                                          x_pairs[1][2 * half + 1]};
          const uint32_t A_fragment[2] = {pairs[2 * half][term], pairs[2 * half + 1][term]};
          mma<T>(acc[ranks], x_fragment, A_fragment);
        }
      }
    }
  }
#pragma unroll
  for (int ranks = 0; ranks < RANK_TILES; ++ranks)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[g + 8 * (i / 2)][8 * ranks + 2 * q + i % 2] = acc[ranks][i];
}

// Sums the warp's tile by fused multiply-adds. Each lane multiplies its own features; shuffles add a token's four
// lanes.
template <typename T, int RANK_TILES>
__device__ __forceinline__ void shrink_by_lanes(WarpSums<RANK_TILES>& sums, const T* x, const float* A,
                                                const ShrinkOperands& s, const ShrinkTile& tile) {
  constexpr int SIZE = Vector<T>::SIZE;
  const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  const int64_t token[2] = {tile.token + g, tile.token + g + 8};
  const uint64_t seed = s.dropout.seed ? *s.dropout.seed : 0;
  float acc[2][8 * RANK_TILES] = {};
  for (int64_t step = tile.step; step < tile.steps; step += tile.stride) {
    const int64_t feature = step * STEP<T> + SIZE * q;
    Vector<T> v[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      v[half] = row_vector(x, token[half], s.tokens, s.x_stride, feature, s.features, s.x_aligned);
      drop(v[half], s.dropout, seed, token[half], feature);
    }
#pragma unroll
    for (int k = 0; k < 8 * RANK_TILES; ++k)
#pragma unroll
      for (int first = 0; first < SIZE; first += 4) {
        const Vector<float> a = row_vector(A, tile.rank + k, s.r, s.A_stride, feature + first, s.features, s.A_aligned);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[half][k] += widened(v[half].at[first + i]) * a.at[i];
      }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < 8 * RANK_TILES; ++k) {
      float total = acc[half][k];
      total += __shfl_xor_sync(ALL_LANES, total, 1);
      total += __shfl_xor_sync(ALL_LANES, total, 2);
      if (q == 0) sums[g + 8 * half][k] = total;
    }
}

// The grid has tiles of tokens in x, tiles of ranks in y, and splits of the features in z. The kernel writes H to out,
// or its share to parts (splits, tokens, R) where there are several splits.
template <typename T, typename A_t, int RANK_TILES>
__global__ void __launch_bounds__(SHRINK_WARPS* WARP, ON_TENSOR_CORES<T, A_t> ? 2 : 1)
    shrink_kernel(SumOutput out, float* parts, const T* x, const A_t* A, ShrinkOperands s, int64_t R) {
  constexpr int64_t RANKS = 8 * RANK_TILES;
  __shared__ WarpSums<RANK_TILES> sums[SHRINK_WARPS];
  const int warp = threadIdx.x / WARP;
  const ShrinkTile tile{blockIdx.x * static_cast<int64_t>(SHRINK_TOKENS), blockIdx.y * RANKS,
                        blockIdx.z * SHRINK_WARPS + warp, gridDim.z * SHRINK_WARPS,
                        (s.features + STEP<T> - 1) / STEP<T>};
  if constexpr (ON_TENSOR_CORES<T, A_t>)
    shrink_on_tensor_cores<T, A_t, RANK_TILES>(sums[warp], x, A, s, tile);
  else
    shrink_by_lanes<T, RANK_TILES>(sums[warp], x, A, s, tile);
  __syncthreads();
  for (int at = threadIdx.x; at < SHRINK_TOKENS * RANKS; at += SHRINK_WARPS * WARP) {
    const int64_t token = tile.token + at / RANKS, rank = tile.rank + at % RANKS;
    if (token >= s.tokens || rank >= R) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < SHRINK_WARPS; ++w) total += sums[w][at / RANKS][at % RANKS];
    if (rank >= s.r) total = 0;  // padding, also where x is infinite
    if (parts)
      parts[(blockIdx.z * s.tokens + token) * R + rank] = total;
    else
      static_cast<A_t*>(out.data)[token * R + rank] = rounded<A_t>(total * out.scale);
  }
}

namespace {

template <typename T, typename A_t, int RANK_TILES>
cudaError_t launch_shrink(const Shrink& s, cudaStream_t stream) {
  const int64_t R = ceil_div(s.r, RANK_STEP) * RANK_STEP;
  const SumOutput out{s.H, s.A.dtype, R, 1, R, s.dropout.scale};
  const ShrinkOperands operands{s.tokens,        s.features,      s.r,      s.x.stride, s.A.stride,
                                is_aligned(s.x), is_aligned(s.A), s.dropout};
  float* parts = s.splits > 1 ? s.parts : nullptr;
  const dim3 grid = grid_of(ceil_div(s.tokens, SHRINK_TOKENS), ceil_div(R, 8 * RANK_TILES), s.splits);
  ROSA_LAUNCH((shrink_kernel<T, A_t, RANK_TILES>), grid, dim3(SHRINK_WARPS * WARP), 0, stream, out, parts,
              static_cast<const T*>(s.x.data), static_cast<const A_t*>(s.A.data), operands, R);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || !parts ? error : add_parts(out, parts, s.tokens, R, s.splits, stream);
}

// The most ranks of a block: so many that registers are left for the loads in flight.
template <typename T, typename A_t>
constexpr int MOST_RANKS = !ON_TENSOR_CORES<T, A_t> ? SHRINK_RANKS_BY_LANES
                           : TERMS<T, A_t> == 1     ? SHRINK_RANKS
                                                    : SHRINK_RANKS_IN_TERMS;

// Chooses the fewest ranks that hold r, halving them from the most on.
template <typename T, typename A_t, int RANKS = MOST_RANKS<T, A_t>>
cudaError_t launch_by_rank(const Shrink& s, cudaStream_t stream) {
  if constexpr (RANKS > RANK_STEP) {
    if (s.r <= RANKS / 2) return launch_by_rank<T, A_t, RANKS / 2>(s, stream);
  }
  return launch_shrink<T, A_t, RANKS / 8>(s, stream);
}

}  // namespace

cudaError_t shrink(const Shrink& s, cudaStream_t stream) {
  if (s.tokens == 0 || s.r == 0) return cudaSuccess;
  return dispatch_dtype(s.x.dtype, [&](auto number) {
    using T = decltype(number);
    if (s.A.dtype == s.x.dtype) return launch_by_rank<T, T>(s, stream);
    return launch_by_rank<T, float>(s, stream);
  });
}

}  // namespace rosa
