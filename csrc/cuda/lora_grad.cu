// The gradients of A and B, sums over tokens of outer products: dB = scaling · dyᵀ H, and dAᵀ = scaling · dropout(x)ᵀ
// dH. Both are zᵀ H here: z is dy or x, H is H or dH. z is large and H small, so that the cost is reading z once.
//
// A block computes 64 features by 16 or 32 ranks. The axis that is summed, the tokens, is split: first among the
// block's eight warps, which take turns at steps of 16 tokens, then among blocks. Both are added in order.
//
// On the tensor cores, H is the (16, 16) operand, ranks down and tokens across, and z the (16, 8) one, features across.
// A lane loads 8 neighbouring features of each of its four tokens, and each of the 8 belongs to another fragment.
#include "cuda/philox.h"
#include "cuda/split_k.h"

namespace rosa {

constexpr int LORA_GRAD_STEP = 16;  // tokens that a warp takes at once
constexpr int LORA_GRAD_WARPS = LORA_GRAD_STEP_TOKENS / LORA_GRAD_STEP;
static_assert(LORA_GRAD_FEATURES == 2 * WARP, "a lane has two features, and eight fragments have eight each");

// What the kernel reads of a LoraGrad. H has R columns.
struct LoraGradOperands {
  int64_t tokens, features, R;
  int64_t z_stride;
  bool z_aligned;
  Dropout dropout;
};

// What a warp sums: features from `feature` on, ranks from `rank` on, and every stride-th step of tokens.
struct LoraGradTile {
  int64_t feature, rank;
  int64_t step, stride;
};

// A warp's sums, which lie in shared memory. The extra column puts neighbouring features into different banks.
using WarpGradSums = float[LORA_GRAD_FEATURES][RANK_STEP + 1];

// Sums the warp's tile on the tensor cores. acc[m][n] has 16 ranks from 16 m on, and in its column g feature 8 g + n.
template <typename T, typename H_t, int RANK_TILES>
__device__ __forceinline__ void lora_grad_on_tensor_cores(float (&acc)[RANK_TILES][8][4], const T* z, const H_t* H,
                                                          const LoraGradOperands& o, const LoraGradTile& tile) {
  const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  const int64_t feature = tile.feature + 8 * g;
  const uint64_t seed = o.dropout.seed ? *o.dropout.seed : 0;
  for (int64_t first = tile.step * LORA_GRAD_STEP; first < o.tokens; first += tile.stride * LORA_GRAD_STEP) {
    Vector<T> z_rows[4];  // They are rows 2q, 2q + 1, 2q + 8 and 2q + 9 of the fragment.
    H_t numbers[RANK_TILES][2][4];
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
                                    ? H[token * o.R + tile.rank + 16 * m + 8 * half + g]
                                    : rounded<H_t>(0.0f);
    }
#pragma unroll
    for (int m = 0; m < RANK_TILES; ++m) {
      uint32_t pairs[4][TERMS<T, H_t>];  // They make the fragment of Hᵀ.
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed_terms<T, H_t>(pairs[i], numbers[m][i % 2][i / 2 * 2], numbers[m][i % 2][i / 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const uint32_t z_fragment[2] = {packed(z_rows[0].at[n], z_rows[1].at[n]),
                                        packed(z_rows[2].at[n], z_rows[3].at[n])};
#pragma unroll
        for (int term = 0; term < TERMS<T, H_t>; ++term) {
          const uint32_t H_fragment[4] = {pairs[0][term], pairs[1][term], pairs[2][term], pairs[3][term]};
          mma<T>(acc[m][n], H_fragment, z_fragment);
        }
      }
    }
  }
}

// Sums the warp's tile by fused multiply-adds. Each lane multiplies 2 neighbouring features by 16 ranks.
template <typename T>
__device__ __forceinline__ void lora_grad_by_lanes(float (&acc)[2][RANK_STEP], const T* z, const float* H,
                                                   const LoraGradOperands& o, const LoraGradTile& tile) {
  const int64_t feature = tile.feature + 2 * (threadIdx.x % WARP);
  const uint64_t seed = o.dropout.seed ? *o.dropout.seed : 0;
  for (int64_t first = tile.step * LORA_GRAD_STEP; first < o.tokens; first += tile.stride * LORA_GRAD_STEP) {
#pragma unroll 4
    for (int64_t token = first; token < min(first + LORA_GRAD_STEP, o.tokens); ++token) {
      unsigned kept = 0xf;
      if (o.dropout.seed)
        kept = keep_bits(seed, o.dropout.threshold, static_cast<uint32_t>(token), static_cast<uint32_t>(feature / 4));
      float numbers[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        numbers[i] = feature + i < o.features && kept >> (feature % 4 + i) & 1
                         ? widened(z[token * o.z_stride + feature + i])
                         : 0.0f;
#pragma unroll
      for (int k = 0; k < RANK_STEP; k += 4) {
        const Vector<float> h = load_vector(H + token * o.R + tile.rank + k, 4, true);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int f = 0; f < 2; ++f) acc[f][k + i] += numbers[f] * h.at[i];
      }
    }
  }
}

// Adds the warps' sums in order and writes them, for RANK_STEP ranks from first_rank on.
template <typename Out>
__device__ __forceinline__ void write_sums(const WarpGradSums (&sums)[LORA_GRAD_WARPS], const SumOutput& out,
                                           float* parts, const LoraGradOperands& o, int64_t first_feature,
                                           int64_t first_rank) {
  for (int at = threadIdx.x; at < LORA_GRAD_FEATURES * RANK_STEP; at += LORA_GRAD_WARPS * WARP) {
    // Neighbouring threads are to write neighbours in memory.
    const bool ranks_first = parts || out.stride_column == 1;
    const int f = ranks_first ? at / RANK_STEP : at % LORA_GRAD_FEATURES,
              k = ranks_first ? at % RANK_STEP : at / LORA_GRAD_FEATURES;
    const int64_t feature = first_feature + f, rank = first_rank + k;
    if (feature >= o.features) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < LORA_GRAD_WARPS; ++w) total += sums[w][f][k];
    if (parts)
      parts[(blockIdx.z * o.features + feature) * o.R + rank] = total;
    else if (rank < out.columns)
      static_cast<Out*>(out.data)[feature * out.stride_row + rank * out.stride_column] =
          rounded<Out>(total * out.scale);
  }
}

// The grid has tiles of features in x, tiles of ranks in y, and splits of the tokens in z. The kernel writes out, or
// its share to parts (splits, features, R) where there are several splits.
template <typename T, typename H_t, int RANK_TILES>
__global__ void __launch_bounds__(LORA_GRAD_WARPS* WARP)
    lora_grad_kernel(SumOutput out, float* parts, const T* z, const H_t* H, LoraGradOperands o) {
  __shared__ WarpGradSums sums[LORA_GRAD_WARPS];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const LoraGradTile tile{blockIdx.x * static_cast<int64_t>(LORA_GRAD_FEATURES),
                          blockIdx.y * static_cast<int64_t>(RANK_STEP) * RANK_TILES,
                          blockIdx.z * LORA_GRAD_WARPS + warp, gridDim.z * LORA_GRAD_WARPS};
  if constexpr (ON_TENSOR_CORES<T, H_t>) {
    const int g = lane / 4, q = lane % 4;
    float acc[RANK_TILES][8][4] = {};
    lora_grad_on_tensor_cores<T, H_t, RANK_TILES>(acc, z, H, o, tile);
#pragma unroll
    for (int m = 0; m < RANK_TILES; ++m) {
      if (tile.rank + 16 * m >= o.R) break;
      if (m) __syncthreads();
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][8 * (2 * q + i % 2) + n][g + 8 * (i / 2)] = acc[m][n][i];
      __syncthreads();
      write_sums<H_t>(sums, out, parts, o, tile.feature, tile.rank + 16 * m);
    }
  } else {
    float acc[2][RANK_STEP] = {};
    lora_grad_by_lanes(acc, z, H, o, tile);
#pragma unroll
    for (int f = 0; f < 2; ++f)
#pragma unroll
      for (int k = 0; k < RANK_STEP; ++k) sums[warp][2 * lane + f][k] = acc[f][k];
    __syncthreads();
    write_sums<H_t>(sums, out, parts, o, tile.feature, tile.rank);
  }
}

namespace {

template <typename T, typename H_t, int RANK_TILES>
cudaError_t launch_lora_grad(const LoraGrad& o, cudaStream_t stream) {
  const int64_t R = ceil_div(o.r, RANK_STEP) * RANK_STEP;
  const SumOutput out{o.out, o.H_dtype, o.stride_f, o.stride_k, o.r, o.scaling * o.dropout.scale};
  const LoraGradOperands operands{o.tokens, o.features, R, o.z.stride, is_aligned(o.z), o.dropout};
  float* parts = o.splits > 1 ? o.parts : nullptr;
  const dim3 grid = grid_of(ceil_div(o.features, LORA_GRAD_FEATURES), ceil_div(R, RANK_STEP * RANK_TILES), o.splits);
  ROSA_LAUNCH((lora_grad_kernel<T, H_t, RANK_TILES>), grid, dim3(LORA_GRAD_WARPS * WARP), 0, stream, out, parts,
              static_cast<const T*>(o.z.data), static_cast<const H_t*>(o.H), operands);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || !parts ? error : add_parts(out, parts, o.features, R, o.splits, stream);
}

}  // namespace

cudaError_t lora_grad(const LoraGrad& o, cudaStream_t stream) {
  if (o.features == 0 || o.r == 0) return cudaSuccess;
  return dispatch_dtype(o.z.dtype, [&](auto number) {
    using T = decltype(number);
    if (o.H_dtype != o.z.dtype) return launch_lora_grad<T, float, 1>(o, stream);
    if constexpr (sizeof(T) == 2) {
      if (o.r > RANK_STEP) return launch_lora_grad<T, T, LORA_GRAD_RANKS / RANK_STEP>(o, stream);
    }
    return launch_lora_grad<T, T, 1>(o, stream);
  });
}

}  // namespace rosa
