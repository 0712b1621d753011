#include "cuda/outer.h"

namespace rosa {
namespace {

template <typename T, typename P_t, int RANK_TILES>
cudaError_t launch_outer(const Outer& o, cudaStream_t stream) {
  const int64_t R = ceil_div(o.r, RANK_STEP) * RANK_STEP;
  const SumTarget target{o.out, o.P_dtype, o.stride_f, o.stride_k, o.r, o.scaling * o.dropout.scale};
  const OuterOperands operands{o.tokens, o.features, R, o.z.stride, is_aligned(o.z), o.dropout};
  float* parts = o.splits > 1 ? o.parts : nullptr;
  const dim3 grid(ceil_div(o.features, SLAB), ceil_div(R, RANK_STEP * RANK_TILES), o.splits);
  ROSA_LAUNCH((outer_kernel<T, P_t, RANK_TILES>), grid, dim3(OUTER_WARPS * WARP), 0, stream, target, parts,
              static_cast<const T*>(o.z.data), static_cast<const P_t*>(o.P), operands);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || !parts ? error : sum_parts(target, parts, o.features, R, o.splits, stream);
}

}  // namespace

cudaError_t outer(const Outer& o, cudaStream_t stream) {
  if (o.features == 0 || o.r == 0) return cudaSuccess;
  return with_type(o.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (o.P_dtype != o.z.dtype) return launch_outer<T, float, 1>(o, stream);
    if constexpr (sizeof(T) == 2) {
      if (o.r > RANK_STEP) return launch_outer<T, T, 2>(o, stream);
    }
    return launch_outer<T, T, 1>(o, stream);
  });
}

}  // namespace rosa
