#include "cuda/shrink.h"

namespace rosa {
namespace {

template <typename T, typename A_t, int RANK_TILES>
cudaError_t launch_shrink(const Shrink& s, cudaStream_t stream) {
  const int64_t R = ceil_div(s.r, RANK_STEP) * RANK_STEP;
  const SumOutput out{s.H, s.A.dtype, R, 1, R, s.dropout.scale};
  const ShrinkOperands operands{s.tokens,        s.features,      s.r,      s.x.stride, s.A.stride,
                                is_aligned(s.x), is_aligned(s.A), s.dropout};
  float* partials = s.splits > 1 ? s.partials : nullptr;
  const dim3 grid(ceil_div(s.tokens, SHRINK_TOKENS), ceil_div(R, 8 * RANK_TILES), s.splits);
  ROSA_LAUNCH((shrink_kernel<T, A_t, RANK_TILES>), grid, dim3(SHRINK_WARPS * WARP), 0, stream, out, partials,
              static_cast<const T*>(s.x.data), static_cast<const A_t*>(s.A.data), operands, R);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || !partials ? error : sum_partials(out, partials, s.tokens, R, s.splits, stream);
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
  return dispatch_dtype(s.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (s.A.dtype == s.x.dtype) return launch_by_rank<T, T>(s, stream);
    return launch_by_rank<T, float>(s, stream);
  });
}

}  // namespace rosa
