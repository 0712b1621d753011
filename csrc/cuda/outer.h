// Sums over tokens of dropout(z)ᵀ P, the gradients of A and B: a skinny product whose cost is reading z once.
//
// A block takes SLAB features and 16 or 32 ranks; its warps, then the splits, share the tokens and are added in order. On
// the tensor cores P is the (16, 16) operand, ranks down and tokens across, and z the (16, 8) one, features across. A lane
// loads 8 features that lie next to each other of each of its four tokens: one for each of 8 fragments.
#pragma once
#include "shrink.h"

namespace rosa {

constexpr int OUTER_WARPS = 8;
constexpr int OUTER_STEP = 16;  // tokens

// The part of an Outer that a kernel reads. R: columns of P.
struct OuterOperands {
  int64_t tokens, features, R;
  int64_t z_stride;
  bool z_aligned;
  Dropout dropout;
};

// What a block sums, and of the steps of tokens each warp's first one and every stride-th after it.
struct OuterTile {
  int64_t feature, rank;
  int64_t step, stride;
};

constexpr int SLAB = 64;

// A warp's sums, in shared memory; + 1: neighbouring features fall into different banks.
using SlabSums = float[SLAB][RANK_STEP + 1];

// The (16, 16) fragments of Pᵀ from a lane's numbers, P[four tokens] at ranks g and g + 8; terms[i] holds their i-th terms.
template <typename T, typename P_t>
struct RankFragment {
  static constexpr int TERMS = sizeof(P_t) > sizeof(T) ? Terms<T>::COUNT : 1;
  uint32_t terms[TERMS][4];

  __device__ __forceinline__ explicit RankFragment(const P_t (&numbers)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const P_t low = numbers[i % 2][i / 2 * 2], high = numbers[i % 2][i / 2 * 2 + 1];
      if constexpr (TERMS > 1) {
        T low_terms[TERMS], high_terms[TERMS];
        split(low, low_terms);
        split(high, high_terms);
#pragma unroll
        for (int term = 0; term < TERMS; ++term) terms[term][i] = packed(low_terms[term], high_terms[term]);
      } else {
        terms[0][i] = packed(low, high);
      }
    }
  }
};

// acc[m][n]: ranks 16 m..., fragment n holds feature 8 g + n of column g.
template <typename T, typename P_t, int RANK_TILES>
__device__ __forceinline__ void outer_on_tensor_cores(float (&acc)[RANK_TILES][8][4], const T* z, const P_t* P,
                                                      const OuterOperands& o, const OuterTile& tile) {
  const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  const int64_t feature = tile.feature + 8 * g;
  const uint64_t seed = o.dropout.seed ? *o.dropout.seed : 0;
  for (int64_t first = tile.step * OUTER_STEP; first < o.tokens; first += tile.stride * OUTER_STEP) {
    Vector<T> z_rows[4];  // of the fragment's rows 2q, 2q + 1, 2q + 8, 2q + 9
    P_t numbers[RANK_TILES][2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = first + 4 * q + i;
      z_rows[i] = row_vector(z, token, o.tokens, o.z_stride, feature, o.features, o.z_aligned);
      drop(z_rows[i], o.dropout, seed, token, feature);
#pragma unroll
      for (int m = 0; m < RANK_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          numbers[m][half][i] = token < o.tokens && tile.rank + 16 * m < o.R
                                    ? P[token * o.R + tile.rank + 16 * m + 8 * half + g]
                                    : rounded<P_t>(0.0f);
    }
#pragma unroll
    for (int m = 0; m < RANK_TILES; ++m) {
      const RankFragment<T, P_t> p(numbers[m]);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint32_t z_fragment[2] = {packed(z_rows[0].at[n], z_rows[1].at[n]), packed(z_rows[2].at[n], z_rows[3].at[n])};
#pragma unroll
        for (int term = 0; term < p.TERMS; ++term) mma<T>(acc[m][n], p.terms[term], z_fragment);
      }
    }
  }
}

// fp32: each lane multiplies 2 features by 16 ranks.
__device__ __forceinline__ void outer_by_lanes(float (&acc)[2][RANK_STEP], const float* z, const float* P,
                                               const OuterOperands& o, const OuterTile& tile) {
  const int lane = threadIdx.x % WARP;
  const uint64_t seed = o.dropout.seed ? *o.dropout.seed : 0;
  for (int64_t first = tile.step * OUTER_STEP; first < o.tokens; first += tile.stride * OUTER_STEP) {
#pragma unroll 4
    for (int64_t token = first; token < min(first + OUTER_STEP, o.tokens); ++token) {
      float numbers[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t feature = tile.feature + lane + WARP * half;
        const bool kept = !o.dropout.seed || keep_bits(seed, o.dropout.threshold, static_cast<uint32_t>(token),
                                                       static_cast<uint32_t>(feature / 4)) >> feature % 4 & 1;
        numbers[half] = feature < o.features && kept ? z[token * o.z_stride + feature] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < RANK_STEP; k += 4) {
        const Vector<float> p = load_vector(P + token * o.R + tile.rank + k, 4, true);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) acc[half][k + i] += numbers[half] * p.at[i];
      }
    }
  }
}

// Adds the warps' sums in order and writes them. ranks: from tile.rank on, RANK_STEP of them.
template <typename Out>
__device__ __forceinline__ void write_slab(const SlabSums (&sums)[OUTER_WARPS], const SumTarget& target, float* parts,
                                           const OuterOperands& o, int64_t first_feature, int64_t first_rank) {
  for (int at = threadIdx.x; at < SLAB * RANK_STEP; at += OUTER_WARPS * WARP) {
    // neighbouring threads write neighbours in memory
    const bool ranks_first = parts || target.stride_column == 1;
    const int f = ranks_first ? at / RANK_STEP : at % SLAB, k = ranks_first ? at % RANK_STEP : at / SLAB;
    const int64_t feature = first_feature + f, rank = first_rank + k;
    if (feature >= o.features) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < OUTER_WARPS; ++w) total += sums[w][f][k];
    if (parts)
      parts[(blockIdx.z * o.features + feature) * o.R + rank] = total;
    else if (rank < target.columns)
      static_cast<Out*>(target.data)[feature * target.stride_row + rank * target.stride_column] =
          rounded<Out>(total * target.scale);
  }
}

// grid: slabs of features, rank tiles, splits of the tokens. Writes target, or parts (splits, features, R) where given.
template <typename T, typename P_t, int RANK_TILES>
__global__ void __launch_bounds__(OUTER_WARPS* WARP)
    outer_kernel(SumTarget target, float* parts, const T* z, const P_t* P, OuterOperands o) {
  __shared__ SlabSums sums[OUTER_WARPS];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const OuterTile tile{blockIdx.x * static_cast<int64_t>(SLAB), blockIdx.y * static_cast<int64_t>(RANK_STEP) * RANK_TILES,
                       blockIdx.z * OUTER_WARPS + warp, gridDim.z * OUTER_WARPS};
  if constexpr (sizeof(T) == 2) {
    const int g = lane / 4, q = lane % 4;
    float acc[RANK_TILES][8][4] = {};
    outer_on_tensor_cores<T, P_t, RANK_TILES>(acc, z, P, o, tile);
#pragma unroll
    for (int m = 0; m < RANK_TILES; ++m) {
      if (tile.rank + 16 * m >= o.R) break;
      if (m) __syncthreads();
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][8 * (2 * q + i % 2) + n][g + 8 * (i / 2)] = acc[m][n][i];
      __syncthreads();
      write_slab<P_t>(sums, target, parts, o, tile.feature, tile.rank + 16 * m);
    }
  } else {
    float acc[2][RANK_STEP] = {};
    outer_by_lanes(acc, z, P, o, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int k = 0; k < RANK_STEP; ++k) sums[warp][lane + WARP * half][k] = acc[half][k];
    __syncthreads();
    write_slab<P_t>(sums, target, parts, o, tile.feature, tile.rank);
  }
}

}  // namespace rosa
