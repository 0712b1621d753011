#include "cuda/epilogue.h"

#include <algorithm>
#include <atomic>

#include "cuda/launch.h"

namespace rosa {
namespace {

EpilogueOperands operands_of(const Epilogue& e) {
  EpilogueOperands o{};
  o.tokens = e.tokens;
  o.in_features = static_cast<int>(e.in_features);
  o.out_features = static_cast<int>(e.out_features);
  o.y_stride = e.y.stride;
  o.y_aligned = is_aligned(e.y);
  o.accumulate = e.accumulate;
  o.r = static_cast<int>(e.r);
  o.R = static_cast<int>(ceil_div(e.r, RANK_STEP) * RANK_STEP);
  o.stride_o = e.stride_o;
  o.stride_k = e.stride_k;
  const int64_t pair = 2 * (e.B_dtype == Dtype::float32 ? 4 : 2);
  o.B_pairs = e.stride_k == 1 && e.r % 2 == 0 && e.stride_o % 2 == 0 && reinterpret_cast<uintptr_t>(e.B) % pair == 0;
  o.scaling = e.scaling;
  o.dropout = e.dropout;
  o.crow = e.crow;
  o.packed_entries = e.packed_entries;
  o.x_stride = e.x.stride;
  o.x_aligned = is_aligned(e.x);
  o.x_transposed_stride = e.x_transposed.stride;
  o.row_products = e.row_products;
  o.rows = e.rows;
  o.row_stride = e.row_stride;
  o.row_terms = e.row_terms;
  return o;
}

// Lets the kernel ask for all of the device's shared memory but what it declares itself. Every call sets the same
// limit, so that calls on several threads do not lower each other's.
template <typename T, typename B_t>
cudaError_t allow_shared_memory() {
  const auto kernel = &epilogue_kernel<T, B_t, Gather::shared>;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  static std::atomic<uint64_t> allowed{0};  // It has a bit for each of the first 64 devices.
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load() & bit) return cudaSuccess;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               limit - STATIC_SHARED_BYTES);
  if (error == cudaSuccess) allowed |= bit;
  return error;
}

// How many groups of 32 features a block takes. Where x is gathered from shared memory, a block fills a multiprocessor,
// and copying its tokens costs it about as much as one round of its warps. So this takes the number of blocks for which
// copies and rounds together are the fewest.
int64_t groups_a_block(int64_t tiles, int64_t groups, int64_t warps, int64_t multiprocessors, Gather gather) {
  if (gather != Gather::shared) return ceil_div(groups, std::min(groups, ceil_div(2 * multiprocessors, tiles)));
  int64_t best = groups, fewest = INT64_MAX;
  for (int64_t chunks = 1; chunks <= std::min<int64_t>(groups, multiprocessors); ++chunks) {
    const int64_t each = ceil_div(groups, chunks), waves = ceil_div(tiles * ceil_div(groups, each), multiprocessors);
    const int64_t rounds = waves * (1 + ceil_div(each, warps));
    if (rounds <= fewest) best = each, fewest = rounds;
  }
  return best;
}

template <typename T, typename B_t, Gather GATHER>
cudaError_t launch_epilogue(const Epilogue& e, cudaStream_t stream) {
  constexpr int WARPS = EPILOGUE_WARPS<B_t, GATHER>;
  int64_t shared = 0;
  if constexpr (GATHER == Gather::shared) {
    shared = epilogue_shared_bytes<T>(e.in_features);
    const cudaError_t error = allow_shared_memory<T, B_t>();
    if (error != cudaSuccess) return error;
  }
  const int64_t tiles = ceil_div(e.tokens, EPILOGUE_TOKENS), groups = ceil_div(e.out_features, EPILOGUE_FEATURES);
  const int64_t each =
      std::max(groups_a_block(tiles, groups, WARPS, e.multiprocessors, GATHER), ceil_div(groups, 65535));
  EpilogueOperands operands = operands_of(e);
  operands.row_by_row = e.packed_entries && each < WARPS / 2;
  const Matrix& x = GATHER == Gather::global ? e.x_transposed : e.x;
  ROSA_LAUNCH((epilogue_kernel<T, B_t, GATHER>), grid_of(tiles, ceil_div(groups, each)), dim3(WARPS * WARP), shared,
              stream, static_cast<T*>(e.y.data), static_cast<const B_t*>(e.H), static_cast<const B_t*>(e.B),
              static_cast<const T*>(x.data), static_cast<const T*>(e.bias), operands,
              static_cast<int>(each * EPILOGUE_FEATURES));
  return cudaGetLastError();
}

template <typename T, typename B_t>
cudaError_t launch_by_gather(const Epilogue& e, cudaStream_t stream) {
  if (!e.packed_entries) return launch_epilogue<T, B_t, Gather::none>(e, stream);
  if (e.x_transposed.data) return launch_epilogue<T, B_t, Gather::global>(e, stream);
  return launch_epilogue<T, B_t, Gather::shared>(e, stream);
}

}  // namespace

cudaError_t epilogue(const Epilogue& e, cudaStream_t stream) {
  if (e.tokens == 0 || e.out_features == 0) return cudaSuccess;
  return dispatch_dtype(e.y.dtype, [&](auto number) {
    using T = decltype(number);
    if (e.r == 0 || e.B_dtype == e.y.dtype) return launch_by_gather<T, T>(e, stream);
    return launch_by_gather<T, float>(e, stream);
  });
}

}  // namespace rosa
