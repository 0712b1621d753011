// out = weight + S, for csr_add and merged weights, and S as a dense matrix for library GEMMs.
//
// A block makes a tile of out, 16 KiB: several short rows, or a piece of a long one, so that neither many short rows
// nor one row full of entries hold up the others. It copies weight, then adds the tile's entries. Nothing is split.
#include <algorithm>

#include "cuda/binary_search.h"
#include "cuda/device_functions.h"
#include "cuda/launch.h"

namespace rosa {

constexpr int DENSIFY_THREADS = 256;
// Loads that a thread has in flight. They are batched by hand, because out may be weight: the compiler may not move
// loads before earlier stores.
constexpr int DENSIFY_BATCH = 4;
template <typename T>
constexpr int DENSIFY_TILE = DENSIFY_THREADS * DENSIFY_BATCH * Vector<T>::SIZE;

// What the kernel reads of a Densify. A tile of more than one row has all columns. tile_columns is all columns or a
// multiple of a vector.
struct DensifyOperands {
  int64_t rows, columns;
  int64_t tile_rows, tile_columns;
  int64_t out_stride, weight_stride;
  bool out_aligned, weight_aligned;
  const int32_t* crow;
  const int32_t* col;
};

struct DensifyTile {
  int64_t row, rows, column, columns;
};

__device__ __forceinline__ DensifyTile densify_tile(const DensifyOperands& s) {
  const int64_t pieces = (s.columns + s.tile_columns - 1) / s.tile_columns;
  const int64_t row = blockIdx.x / pieces * s.tile_rows, column = blockIdx.x % pieces * s.tile_columns;
  return {row, min(s.tile_rows, s.rows - row), column, min(s.tile_columns, s.columns - column)};
}

// Copies weight, or zeros where it is null.
template <typename T>
__device__ __forceinline__ void copy_tile(T* out, const T* weight, const DensifyOperands& s, const DensifyTile& tile) {
  constexpr int SIZE = Vector<T>::SIZE;
  const int vectors_a_row = static_cast<int>((tile.columns + SIZE - 1) / SIZE);
  const int vectors = static_cast<int>(tile.rows) * vectors_a_row;
  for (int first = threadIdx.x; first < vectors; first += DENSIFY_BATCH * DENSIFY_THREADS) {
    Vector<T> v[DENSIFY_BATCH];
    int64_t row[DENSIFY_BATCH], column[DENSIFY_BATCH], count[DENSIFY_BATCH];
#pragma unroll
    for (int i = 0; i < DENSIFY_BATCH; ++i) {
      const int at = first + i * DENSIFY_THREADS, offset = at % vectors_a_row * SIZE;
      row[i] = tile.row + at / vectors_a_row;
      column[i] = tile.column + offset;
      count[i] = at < vectors ? tile.columns - offset : 0;
      v[i] = Vector<T>{};
      if (weight) v[i] = load_vector(weight + row[i] * s.weight_stride + column[i], count[i], s.weight_aligned);
    }
#pragma unroll
    for (int i = 0; i < DENSIFY_BATCH; ++i)
      store_vector(out + row[i] * s.out_stride + column[i], v[i], count[i], s.out_aligned);
  }
}

// Adds entries [first, end), all of them in the tile. It reads weight, not what copy_tile wrote.
template <typename T, typename V>
__device__ __forceinline__ void add_entries(T* out, const T* weight, const V* values, const DensifyOperands& s,
                                            const DensifyTile& tile, int64_t first, int64_t end) {
  for (int64_t e = first + threadIdx.x; e < end; e += DENSIFY_BATCH * DENSIFY_THREADS) {
    T* place[DENSIFY_BATCH] = {};
    float sum[DENSIFY_BATCH];
#pragma unroll
    for (int i = 0; i < DENSIFY_BATCH; ++i) {
      const int64_t entry = e + i * DENSIFY_THREADS;
      if (entry >= end) break;
      const int64_t row = tile.row + row_of_entry(s.crow + tile.row, tile.rows, entry), column = s.col[entry];
      place[i] = out + row * s.out_stride + column;
      sum[i] = widened(values[entry]) + (weight ? widened(weight[row * s.weight_stride + column]) : 0.0f);
    }
#pragma unroll
    for (int i = 0; i < DENSIFY_BATCH; ++i)
      if (place[i]) *place[i] = rounded<T>(sum[i]);
  }
}

// A block has a tile. Blocks next to each other have tiles of the same rows.
template <typename T, typename V>
__global__ void __launch_bounds__(DENSIFY_THREADS)
    densify_kernel(T* out, const T* weight, const V* values, DensifyOperands s) {
  const DensifyTile tile = densify_tile(s);
  if (out != weight) copy_tile(out, weight, s, tile);
  int64_t first = s.crow[tile.row], end = s.crow[tile.row + tile.rows];
  if (tile.columns < s.columns) {
    first = first_entry_at(s.col, first, end, tile.column);
    end = first_entry_at(s.col, first, end, tile.column + tile.columns);
  }
  __syncthreads();
  add_entries(out, weight, values, s, tile, first, end);
}

namespace {

template <typename T>
DensifyOperands operands_of(const Densify& s) {
  const int64_t pieces = ceil_div(s.columns, DENSIFY_TILE<T>);
  const int64_t tile_columns = ceil_div(ceil_div(s.columns, pieces), Vector<T>::SIZE) * Vector<T>::SIZE;
  return {s.rows,
          s.columns,
          std::max<int64_t>(1, DENSIFY_TILE<T> / s.columns),
          tile_columns,
          s.out.stride,
          s.weight.stride,
          is_aligned(s.out),
          is_aligned(s.weight),
          s.crow,
          s.col};
}

}  // namespace

cudaError_t densify(const Densify& s, cudaStream_t stream) {
  if (s.rows == 0 || s.columns == 0) return cudaSuccess;
  dispatch_dtype(s.out.dtype, [&](auto number) {
    using T = decltype(number);
    const DensifyOperands operands = operands_of<T>(s);
    const dim3 grid = grid_of(ceil_div(s.rows, operands.tile_rows) * ceil_div(s.columns, operands.tile_columns));
    dispatch_dtype(s.values_dtype, [&](auto value) {
      using V = decltype(value);
      ROSA_LAUNCH((densify_kernel<T, V>), grid, dim3(DENSIFY_THREADS), 0, stream, static_cast<T*>(s.out.data),
                  static_cast<const T*>(s.weight.data), static_cast<const V*>(s.values), operands);
    });
  });
  return cudaGetLastError();
}

}  // namespace rosa
