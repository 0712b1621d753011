// y = (y +) bias + scaling · dropout(H Bᵀ) + x Sᵀ in one pass over y. Each element is summed in fp32 and rounded once.
//
// csrc/cuda/linear.cpp calls it before the library's GEMM, which adds x Wᵀ, for y and for dx. For dx, dy stands for x,
// dH for H, and Sᵀ for S, and the features below are those of that product.
//
// A block computes 16 tokens and a chunk of the out_features; nothing is split over in_features. A warp takes 32
// features at a time, and each lane two tokens of 8 neighbouring features, so that y moves in 16-byte accesses. Lane
// 4 g + q has tokens 2g and 2g + 1 and features 8q to 8q + 7. Warps take the next 32 features from a counter when they
// are done, so that one long row of S does not hold up the others.
//
// The low-rank part (expand, in the names of this field) runs on the tensor cores in 16 bits. An mma sees the lane's
// tokens as its rows g and g + 8, and features 8q + 2n and 8q + 2n + 1 as columns 2q and 2q + 1 of fragment n.
//
// x Sᵀ is gathered: for each entry of S, a lane reads its two tokens of x at the entry's column. For that, the block
// first copies its 16 tokens of x, transposed, into shared memory, which serves such reads faster than L2
// (rosa_kernels/backends/cuda/heuristics.py). Where shared memory cannot hold all features, x comes transposed from
// global memory (transpose.cu). The eight lanes of one q read the same row of S, and the four q's four rows. A long row
// is divided among the four q's instead. Few tokens make few blocks, and then the rows of S are all the parallelism
// that is left: eight warps share 32 features, and each lane takes one row of S instead of eight.
#pragma once
#include "cuda/device_functions.h"
#include "cuda/kernels.h"
#include "cuda/philox.h"

namespace rosa {

constexpr int EPILOGUE_FEATURES = 32;
constexpr int LONG_ROW = 128;  // A row of more entries is long: eight times the mean of a 4096 x 4096 S at 0.4 %.

// Dynamic shared memory for the block's tokens of x, transposed.
template <typename T>
constexpr int64_t epilogue_shared_bytes(int64_t in_features) {
  return in_features * EPILOGUE_TOKENS * sizeof(T);
}

// What a kernel reads of an Epilogue.
struct EpilogueOperands {
  int64_t tokens;
  int in_features, out_features;
  int64_t y_stride;
  bool y_aligned, accumulate;
  int r, R;
  int64_t stride_o, stride_k;
  bool B_pairs;  // whether one access may read B[o, k] and B[o, k + 1] for even k
  float scaling;
  Dropout dropout;
  const int32_t* crow;
  const PackedEntry* packed_entries;
  int64_t x_stride;
  bool x_aligned;
  int64_t x_transposed_stride;
  const float* row_products;
  int64_t rows, row_stride;
  int row_terms;
  bool row_by_row;  // Eight warps share 32 features, because there are few tokens.
};

constexpr unsigned ALL_FEATURES = 0xff;  // a bit for each of a lane's 8 features

// A lane's part of y: acc[f][t] belongs to the lane's f-th feature and t-th token.
struct LanePart {
  float acc[8][2];
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T at[2];
};

template <typename T>
__device__ __forceinline__ void widen(float (&numbers)[2], const Pair<T>& pair) {
  numbers[0] = widened(pair.at[0]);
  numbers[1] = widened(pair.at[1]);
}

// bf16 is the upper half of fp32, so that one instruction widens a number.
__device__ __forceinline__ void widen(float (&numbers)[2], const Pair<__nv_bfloat16>& pair) {
  uint32_t bits[2];
  memcpy(bits, &pair, 4);
  bits[1] = bits[0] & 0xffff0000u;
  bits[0] <<= 16;
  memcpy(numbers, bits, 8);
}

// x_transposed[feature * 16 + t] = x[first_token + t, feature], or zero beyond the last token.
template <typename T>
__device__ void copy_transposed(T* x_transposed, const T* x, const EpilogueOperands& e, int64_t first_token) {
  constexpr int SIZE = Vector<T>::SIZE;
  // Eight lanes copy one vector of features, each a pair of tokens: together their stores fill 32 neighbouring bytes.
  for (int at = threadIdx.x; at < (e.in_features + SIZE - 1) / SIZE * 8; at += blockDim.x) {
    const int feature = at / 8 * SIZE, token = at % 8 * 2;
    Vector<T> v[2];
#pragma unroll
    for (int t = 0; t < 2; ++t)
      v[t] = row_vector(x, first_token + token + t, e.tokens, e.x_stride, feature, e.in_features, e.x_aligned);
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (feature + i < e.in_features)
        *reinterpret_cast<Pair<T>*>(x_transposed + (feature + i) * EPILOGUE_TOKENS + token) = {v[0].at[i], v[1].at[i]};
  }
}

// B[feature, k] and B[feature, k + 1]; zeros stand where there are none.
template <typename B_t>
__device__ __forceinline__ Pair<B_t> load_rank_pair(const B_t* B, const EpilogueOperands& e, int feature, int k) {
  Pair<B_t> pair = {};
  if (feature >= e.out_features) return pair;
  const B_t* at = B + feature * e.stride_o + k * e.stride_k;
  if (e.B_pairs) {
    if (k < e.r) pair = *reinterpret_cast<const Pair<B_t>*>(at);
  } else {
    if (k < e.r) pair.at[0] = at[0];
    if (k + 1 < e.r) pair.at[1] = at[e.stride_k];
  }
  return pair;
}

// acc = H Bᵀ on the tensor cores. A wider H is rounded once to T. `mine` is as for add_sparse.
template <typename T, typename B_t>
__device__ __forceinline__ void add_low_rank_on_tensor_cores(LanePart& part, const B_t* H, const B_t* B,
                                                             const EpilogueOperands& e, int64_t token,
                                                             int first_feature, unsigned mine) {
  const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  float acc[4][4] = {};
  for (int k = 0; k < e.R; k += 16) {
    uint32_t H_fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t t = token + i % 2;
      Pair<B_t> pair = {};
      if (t < e.tokens) pair = *reinterpret_cast<const Pair<B_t>*>(H + t * e.R + k + 8 * (i / 2) + 2 * q);
      H_fragment[i] = packed(converted<T>(pair.at[0]), converted<T>(pair.at[1]));
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (!(mine >> 2 * n & 3)) continue;
      uint32_t pairs[2][TERMS<T, B_t>];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int feature = first_feature + 8 * (g / 2) + 2 * n + g % 2;
        const Pair<B_t> pair = load_rank_pair(B, e, feature, k + 8 * half + 2 * q);
        packed_terms<T, B_t>(pairs[half], pair.at[0], pair.at[1]);
      }
#pragma unroll
      for (int term = 0; term < TERMS<T, B_t>; ++term) {
        const uint32_t B_fragment[2] = {pairs[0][term], pairs[1][term]};
        mma<T>(acc[n], H_fragment, B_fragment);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) part.acc[2 * n + i % 2][i / 2] = acc[n][i];
}

// acc = H Bᵀ by fused multiply-adds.
__device__ __forceinline__ void add_low_rank_by_lanes(LanePart& part, const float* H, const float* B,
                                                      const EpilogueOperands& e, int64_t token, int feature) {
  for (int k = 0; k < e.r; ++k) {
    float h[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) h[t] = token + t < e.tokens ? H[(token + t) * e.R + k] : 0.0f;
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const float b =
          feature + f < e.out_features ? B[static_cast<int64_t>(feature + f) * e.stride_o + k * e.stride_k] : 0.0f;
      part.acc[f][0] += h[0] * b;
      part.acc[f][1] += h[1] * b;
    }
  }
}

// acc = scaling · dropout(acc)
__device__ __forceinline__ void scale_low_rank(LanePart& part, const EpilogueOperands& e, int64_t token, int feature,
                                               unsigned mine) {
  const uint64_t seed = e.dropout.seed ? *e.dropout.seed : 0;
  const float scaling = e.scaling * e.dropout.scale;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      if (!(mine >> 4 * group & 0xf)) continue;
      const unsigned bits = e.dropout.seed ? keep_bits(seed, e.dropout.threshold, static_cast<uint32_t>(token + t),
                                                       static_cast<uint32_t>(feature / 4 + group))
                                           : 0xf;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& number = part.acc[4 * group + i][t];
        number = bits >> i & 1 ? scaling * number : 0.0f;
      }
    }
}

constexpr int BATCH = 4;  // A lane has the loads of so many entries in flight together.
static_assert(ENTRY_PADDING >= 2 * BATCH * 4, "the batch after a long row's last one");

// Reads the entries of one row of S, and x at their columns. x_transposed has x[token, feature] at feature * stride,
// and x[token + 1, feature] next to it. Stride_t is int where offsets fit into it.
template <typename T, typename Stride_t>
struct RowReader {
  const PackedEntry* entries;
  int end, step;
  const T* x_transposed;
  Stride_t stride;

  // This may read past the row's end, into the next row or the ENTRY_PADDING. add() leaves those entries out.
  __device__ __forceinline__ void load(PackedEntry (&batch)[BATCH], int at) const {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) batch[i] = entries[at + i * step];
  }

  __device__ __forceinline__ void add(float (&sums)[2], const PackedEntry& entry) const {
    float x[2];
    widen(x, *reinterpret_cast<const Pair<T>*>(x_transposed + entry.col * stride));
    sums[0] += entry.value * x[0];
    sums[1] += entry.value * x[1];
  }

  // Adds the products of the entries in `batch`, which was loaded from position `at`.
  __device__ __forceinline__ void add(float (&sums)[2], const PackedEntry (&batch)[BATCH], int at) const {
    if (at + (BATCH - 1) * step < end) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) add(sums, batch[i]);
    } else {
#pragma unroll
      for (int i = 0; i < BATCH - 1; ++i)
        if (at + i * step < end) add(sums, batch[i]);
    }
  }

  // Adds value · x[token, col] and value · x[token + 1, col] of entries at, at + step, ... below end. Two batches take
  // turns, so that one is on its way from L2 while the other is added.
  __device__ __forceinline__ void gather(float (&sums)[2], int at) const {
    PackedEntry even[BATCH], odd[BATCH];
    if (at < end) load(even, at);
#pragma unroll 1
    while (at < end) {
      load(odd, at + BATCH * step);
      add(sums, even, at);
      at += BATCH * step;
      if (at >= end) break;
      load(even, at + BATCH * step);
      add(sums, odd, at);
      at += BATCH * step;
    }
  }
};

// acc += x Sᵀ at those of the lane's features whose bits are set in `mine`. Returns whether S has any entry there.
template <typename T, typename Stride_t>
__device__ __forceinline__ bool add_sparse(LanePart& part, const EpilogueOperands& e, const T* x_transposed,
                                           Stride_t stride, int feature, unsigned mine) {
  const int q = threadIdx.x % 4;
  int bounds[9];
#pragma unroll
  for (int f = 0; f < 9; ++f) bounds[f] = e.crow[min(feature + f, e.out_features)];
  bool any = false;
#pragma unroll
  for (int f = 0; f < 8; ++f) {
    if (!(mine >> f & 1)) continue;
    const int first = bounds[f], end = bounds[f + 1];
    any |= first < end;
    const bool is_long = end - first > LONG_ROW;
    float sums[2] = {};
    if (!is_long) RowReader<T, Stride_t>{e.packed_entries, end, 1, x_transposed, stride}.gather(sums, first);
    const unsigned long_lanes = __ballot_sync(ALL_LANES, is_long) & 0xf;  // Lanes 0 to 3 stand for the four rows.
#pragma unroll 1
    for (int owner = 0; owner < 4 && long_lanes; ++owner) {
      if (!(long_lanes >> owner & 1)) continue;
      const int row_first = __shfl_sync(ALL_LANES, first, owner), row_end = __shfl_sync(ALL_LANES, end, owner);
      float shared[2] = {};
      RowReader<T, Stride_t>{e.packed_entries, row_end, 4, x_transposed, stride}.gather(shared, row_first + q);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        shared[t] += __shfl_xor_sync(ALL_LANES, shared[t], 1);
        shared[t] += __shfl_xor_sync(ALL_LANES, shared[t], 2);
        if (q == owner) sums[t] = shared[t];
      }
    }
    part.acc[f][0] += sums[0];
    part.acc[f][1] += sums[1];
  }
  return any;
}

// acc += row_products at the rows of S that are not empty, each of in_features entries. Returns whether there are any
// among the lane's features.
__device__ __forceinline__ bool add_rows(LanePart& part, const EpilogueOperands& e, int64_t token, int feature) {
  bool any = false;
#pragma unroll
  for (int f = 0; f < 8; ++f) {
    const int first = e.crow[min(feature + f, e.out_features)];
    if (first == e.crow[min(feature + f + 1, e.out_features)]) continue;
    any = true;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (token + t >= e.tokens) continue;
      const float* products = e.row_products + (token + t) * e.row_stride + first / e.in_features;
      for (int term = 0; term < e.row_terms; ++term) part.acc[f][t] += products[term * e.rows];
    }
  }
  return any;
}

// acc += bias
template <typename T>
__device__ __forceinline__ void add_bias(LanePart& part, const T* bias, const EpilogueOperands& e, int feature) {
#pragma unroll
  for (int f = 0; f < 8; ++f) {
    if (feature + f >= e.out_features) break;
    const float number = widened(bias[feature + f]);
    part.acc[f][0] += number;
    part.acc[f][1] += number;
  }
}

// y = (y +) acc, rounded, at those of the lane's features whose bits are set in `mine`.
template <typename T>
__device__ __forceinline__ void store_part(T* y, const LanePart& part, const EpilogueOperands& e, int64_t token,
                                           int feature, unsigned mine) {
  constexpr int SIZE = Vector<T>::SIZE;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    if (token + t >= e.tokens) continue;
    T* row = y + (token + t) * e.y_stride + feature;
#pragma unroll
    for (int f = 0; f < 8; f += SIZE) {
      const int count = e.out_features - feature - f;
      if (mine != ALL_FEATURES) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
          if (mine >> (f + i) & 1 && i < count)
            row[f + i] = rounded<T>(part.acc[f + i][t] + (e.accumulate ? widened(row[f + i]) : 0.0f));
        continue;
      }
      Vector<T> v{};
      if (e.accumulate) v = load_vector(row + f, count, e.y_aligned);
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        v.at[i] = rounded<T>(part.acc[f + i][t] + (e.accumulate ? widened(v.at[i]) : 0.0f));
      store_vector(row + f, v, count, e.y_aligned);
    }
  }
}

// Where x is gathered from: nowhere, the block's own transposed copy in shared memory, or xᵀ in global memory.
enum class Gather { none, shared, global };

// Warps in a block. Where one block fills the shared memory of a multiprocessor, only its own warps can hide the
// latency of the entries: there are as many as the registers allow.
template <typename B_t, Gather GATHER>
constexpr int EPILOGUE_WARPS = GATHER != Gather::shared ? 8
                               : sizeof(B_t) == 2       ? 24
                                                        : 16;

// The grid has tiles of tokens in x, and in y chunks of `chunk` features, a multiple of EPILOGUE_FEATURES. A launch
// with Gather::shared asks for epilogue_shared_bytes of dynamic shared memory.
template <typename T, typename B_t, Gather GATHER>
__global__ void __launch_bounds__(EPILOGUE_WARPS<B_t, GATHER>* WARP, GATHER == Gather::shared ? 1 : 2)
    epilogue_kernel(T* y, const B_t* H, const B_t* B, const T* x, const T* bias, EpilogueOperands e, int chunk) {
  ROSA_DYNAMIC_SHARED(T, shared_x);
  __shared__ int next_group;
  const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * EPILOGUE_TOKENS, token = first_token + 2 * g;
  const int first = blockIdx.y * chunk, end = min(first + chunk, e.out_features);
  const T* x_transposed = nullptr;
  if constexpr (GATHER == Gather::shared) {
    copy_transposed(shared_x, x, e, first_token);
    x_transposed = shared_x + 2 * g;
  } else if constexpr (GATHER == Gather::global) {
    x_transposed = x + token;
  }
  if (threadIdx.x == 0) next_group = 0;
  __syncthreads();
  while (true) {
    int group = lane == 0 ? atomicAdd(&next_group, 1) : 0;
    group = __shfl_sync(ALL_LANES, group, 0);
    unsigned mine = ALL_FEATURES;
    if (e.row_by_row) {
      mine = 1u << group % 8;
      group /= 8;
    }
    const int first_feature = first + group * EPILOGUE_FEATURES;
    if (first_feature >= end) break;
    const int feature = first_feature + 8 * q;
    LanePart part = {};
    bool any = !e.accumulate || bias;
    if (e.r > 0) {
      any = true;
      if constexpr (ON_TENSOR_CORES<T, B_t>)
        add_low_rank_on_tensor_cores<T, B_t>(part, H, B, e, token, first_feature, mine);
      else
        add_low_rank_by_lanes(part, H, B, e, token, feature);
      scale_low_rank(part, e, token, feature, mine);
    }
    if constexpr (GATHER == Gather::shared) any |= add_sparse(part, e, x_transposed, EPILOGUE_TOKENS, feature, mine);
    if constexpr (GATHER == Gather::global)
      any |= add_sparse(part, e, x_transposed, e.x_transposed_stride, feature, mine);
    if constexpr (GATHER == Gather::none)  // elsewhere it would take registers for nothing
      if (e.row_products) any |= add_rows(part, e, token, feature);
    if (bias) add_bias(part, bias, e, feature);
    if (any) store_part(y, part, e, token, feature, mine);
  }
}

}  // namespace rosa
