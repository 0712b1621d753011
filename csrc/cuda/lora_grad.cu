#include "cuda/lora_grad.h"

namespace rosa {
namespace {

template <typename T, typename H_t, int RANK_TILES>
cudaError_t launch_lora_grad(const LoraGrad& o, cudaStream_t stream) {
  const int64_t R = ceil_div(o.r, RANK_STEP) * RANK_STEP;
  const SumOutput out{o.out, o.H_dtype, o.stride_f, o.stride_k, o.r, o.scaling * o.dropout.scale};
  const LoraGradOperands operands{o.tokens, o.features, R, o.z.stride, is_aligned(o.z), o.dropout};
  float* partials = o.splits > 1 ? o.partials : nullptr;
  const dim3 grid(ceil_div(o.features, LORA_GRAD_FEATURES), ceil_div(R, RANK_STEP * RANK_TILES), o.splits);
  ROSA_LAUNCH((lora_grad_kernel<T, H_t, RANK_TILES>), grid, dim3(LORA_GRAD_WARPS * WARP), 0, stream, out, partials,
              static_cast<const T*>(o.z.data), static_cast<const H_t*>(o.H), operands);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || !partials ? error : sum_partials(out, partials, o.features, R, o.splits, stream);
}

}  // namespace

cudaError_t lora_grad(const LoraGrad& o, cudaStream_t stream) {
  if (o.features == 0 || o.r == 0) return cudaSuccess;
  return dispatch_dtype(o.z.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (o.H_dtype != o.z.dtype) return launch_lora_grad<T, float, 1>(o, stream);
    if constexpr (sizeof(T) == 2) {
      if (o.r > RANK_STEP) return launch_lora_grad<T, T, LORA_GRAD_RANKS / RANK_STEP>(o, stream);
    }
    return launch_lora_grad<T, T, 1>(o, stream);
  });
}

}  // namespace rosa
