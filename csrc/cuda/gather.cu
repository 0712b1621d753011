// Gathers: columns of a matrix that index or crow names, and the numbers of a matrix at S's entries. Both let a library
// GEMM compute what S needs: gather_columns collects its operand where S has whole rows or columns, gather_entries
// collects S's gradient from all of dyᵀ x.
#include "cuda/binary_search.h"
#include "cuda/device_functions.h"
#include "cuda/launch.h"

namespace rosa {

constexpr int GATHER_COLUMNS = WARP;  // one for each lane
constexpr int GATHER_WARPS = 8;
constexpr int GATHER_TOKENS = 8;  // those of a warp, whose loads are in flight together

// What the kernel reads of a GatherColumns.
struct GatherColumnsOperands {
  int64_t tokens, count;
  int64_t out_stride, x_stride;
  const int32_t* col;
  const int32_t* crow;
  int64_t rows, row_length;
};

// A block gathers 32 columns of 64 tokens. Blocks next to each other have the same tokens.
template <typename T>
__global__ void __launch_bounds__(GATHER_WARPS* WARP)
    gather_columns_kernel(T* out, const T* x, GatherColumnsOperands g) {
  __shared__ int64_t index[GATHER_COLUMNS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t column_tiles = (g.count + GATHER_COLUMNS - 1) / GATHER_COLUMNS;
  const int64_t p = blockIdx.x % column_tiles * GATHER_COLUMNS + lane;
  const int64_t first_token = (blockIdx.x / column_tiles * GATHER_WARPS + warp) * GATHER_TOKENS;
  if (warp == 0 && p < g.count) index[lane] = g.col ? g.col[p] : row_of_entry(g.crow, g.rows, p * g.row_length);
  __syncthreads();
  if (p >= g.count) return;
  const T* column = x + index[lane];
  T numbers[GATHER_TOKENS];
#pragma unroll
  for (int t = 0; t < GATHER_TOKENS; ++t)
    if (first_token + t < g.tokens) numbers[t] = column[(first_token + t) * g.x_stride];
#pragma unroll
  for (int t = 0; t < GATHER_TOKENS; ++t)
    if (first_token + t < g.tokens) out[(first_token + t) * g.out_stride + p] = numbers[t];
}

cudaError_t gather_columns(const GatherColumns& g, cudaStream_t stream) {
  if (g.tokens == 0 || g.count == 0) return cudaSuccess;
  const GatherColumnsOperands operands{g.tokens, g.count, g.out.stride, g.x.stride,
                                       g.col,    g.crow,  g.rows,       g.row_length};
  const dim3 grid = grid_of(ceil_div(g.count, GATHER_COLUMNS) * ceil_div(g.tokens, GATHER_WARPS * GATHER_TOKENS));
  dispatch_dtype(g.x.dtype, [&](auto number) {
    using T = decltype(number);
    ROSA_LAUNCH(gather_columns_kernel<T>, grid, dim3(GATHER_WARPS * WARP), 0, stream, static_cast<T*>(g.out.data),
                static_cast<const T*>(g.x.data), operands);
  });
  return cudaGetLastError();
}

constexpr int GATHER_ENTRIES_THREADS = 256;
constexpr int GATHER_ENTRIES_A_THREAD = 4;

// What the kernel reads of a GatherEntries.
struct GatherEntriesOperands {
  int64_t rows, nnz, stride;
  const int32_t* crow;
  const int32_t* col;
};

// A block gathers 1024 neighbouring entries. It first finds the rows of its first and last entry, between which each
// thread then searches.
template <typename T>
__global__ void __launch_bounds__(GATHER_ENTRIES_THREADS)
    gather_entries_kernel(T* out, const T* matrix, GatherEntriesOperands p) {
  constexpr int ENTRIES = GATHER_ENTRIES_THREADS * GATHER_ENTRIES_A_THREAD;
  __shared__ int64_t rows_of_block[2];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ENTRIES, end = min(first + ENTRIES, p.nnz);
  if (threadIdx.x < 2) rows_of_block[threadIdx.x] = row_of_entry(p.crow, p.rows, threadIdx.x ? end - 1 : first);
  __syncthreads();
  const int64_t first_row = rows_of_block[0], rows = rows_of_block[1] - first_row + 1;
#pragma unroll
  for (int i = 0; i < GATHER_ENTRIES_A_THREAD; ++i) {
    const int64_t e = first + i * GATHER_ENTRIES_THREADS + threadIdx.x;
    if (e >= end) break;
    const int64_t row = first_row + row_of_entry(p.crow + first_row, rows, e);
    out[e] = matrix[row * p.stride + p.col[e]];
  }
}

cudaError_t gather_entries(const GatherEntries& p, cudaStream_t stream) {
  if (p.nnz == 0) return cudaSuccess;
  const GatherEntriesOperands operands{p.rows, p.nnz, p.matrix.stride, p.crow, p.col};
  const dim3 grid = grid_of(ceil_div(p.nnz, GATHER_ENTRIES_THREADS * GATHER_ENTRIES_A_THREAD));
  dispatch_dtype(p.matrix.dtype, [&](auto number) {
    using T = decltype(number);
    ROSA_LAUNCH((gather_entries_kernel<T>), grid, dim3(GATHER_ENTRIES_THREADS), 0, stream, static_cast<T*>(p.out),
                static_cast<const T*>(p.matrix.data), operands);
  });
  return cudaGetLastError();
}

}  // namespace rosa
