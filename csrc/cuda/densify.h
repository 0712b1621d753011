// out = base + S. A block makes a tile of out, 16 KiB: short rows whole, a piece of a long one, so that neither many
// short rows nor one row full of entries hold anybody up. It copies base, then adds the tile's entries.
#pragma once
#include "cuda/binary_search.h"
#include "cuda/device_functions.h"
#include "cuda/kernels.h"

namespace rosa {

constexpr int SCATTER_THREADS = 256;
constexpr int SCATTER_BATCH = 4;  // loads of a thread in flight: out may be base, so stores hold back later loads
template <typename T>
constexpr int SCATTER_TILE = SCATTER_THREADS * SCATTER_BATCH * Vector<T>::SIZE;

// The part of a Scatter that a kernel reads. Tiles of tile_rows > 1 have all columns; tile_columns is a multiple of a
// vector, unless it is all columns.
struct ScatterOperands {
  int64_t rows, columns;
  int64_t tile_rows, tile_columns;
  int64_t out_stride, base_stride;
  bool out_aligned, base_aligned;
  const int32_t* crow;
  const int32_t* col;
};

struct ScatterTile {
  int64_t row, rows, column, columns;
};

__device__ __forceinline__ ScatterTile scatter_tile(const ScatterOperands& s) {
  const int64_t pieces = (s.columns + s.tile_columns - 1) / s.tile_columns;
  const int64_t row = blockIdx.x / pieces * s.tile_rows, column = blockIdx.x % pieces * s.tile_columns;
  return {row, min(s.tile_rows, s.rows - row), column, min(s.tile_columns, s.columns - column)};
}

// out = base, or zeros where base is null
template <typename T>
__device__ __forceinline__ void copy_tile(T* out, const T* base, const ScatterOperands& s, const ScatterTile& tile) {
  constexpr int SIZE = Vector<T>::SIZE;
  const int vectors_a_row = static_cast<int>((tile.columns + SIZE - 1) / SIZE);
  const int vectors = static_cast<int>(tile.rows) * vectors_a_row;
  for (int first = threadIdx.x; first < vectors; first += SCATTER_BATCH * SCATTER_THREADS) {
    Vector<T> v[SCATTER_BATCH];
    int64_t row[SCATTER_BATCH], column[SCATTER_BATCH], count[SCATTER_BATCH];
#pragma unroll
    for (int i = 0; i < SCATTER_BATCH; ++i) {
      const int at = first + i * SCATTER_THREADS, offset = at % vectors_a_row * SIZE;
      row[i] = tile.row + at / vectors_a_row;
      column[i] = tile.column + offset;
      count[i] = at < vectors ? tile.columns - offset : 0;
      v[i] = Vector<T>{};
      if (base) v[i] = load_vector(base + row[i] * s.base_stride + column[i], count[i], s.base_aligned);
    }
#pragma unroll
    for (int i = 0; i < SCATTER_BATCH; ++i)
      store_vector(out + row[i] * s.out_stride + column[i], v[i], count[i], s.out_aligned);
  }
}

// out = base + value at entries [first, end), all in the tile
template <typename T, typename V>
__device__ __forceinline__ void add_entries(T* out, const T* base, const V* values, const ScatterOperands& s,
                                            const ScatterTile& tile, int64_t first, int64_t end) {
  for (int64_t e = first + threadIdx.x; e < end; e += SCATTER_BATCH * SCATTER_THREADS) {
    T* target[SCATTER_BATCH] = {};
    float sum[SCATTER_BATCH];
#pragma unroll
    for (int i = 0; i < SCATTER_BATCH; ++i) {
      const int64_t entry = e + i * SCATTER_THREADS;
      if (entry >= end) break;
      const int64_t row = tile.row + row_of_entry(s.crow + tile.row, tile.rows, entry), column = s.col[entry];
      target[i] = out + row * s.out_stride + column;
      sum[i] = widened(values[entry]) + (base ? widened(base[row * s.base_stride + column]) : 0.0f);
    }
#pragma unroll
    for (int i = 0; i < SCATTER_BATCH; ++i)
      if (target[i]) *target[i] = rounded<T>(sum[i]);
  }
}

// grid: a block a tile, those of the same rows next to each other.
template <typename T, typename V>
__global__ void __launch_bounds__(SCATTER_THREADS)
    scatter_kernel(T* out, const T* base, const V* values, ScatterOperands s) {
  const ScatterTile tile = scatter_tile(s);
  if (out != base) copy_tile(out, base, s, tile);
  int64_t first = s.crow[tile.row], end = s.crow[tile.row + tile.rows];
  if (tile.columns < s.columns) {
    first = first_entry_at(s.col, first, end, tile.column);
    end = first_entry_at(s.col, first, end, tile.column + tile.columns);
  }
  __syncthreads();
  add_entries(out, base, values, s, tile, first, end);
}

}  // namespace rosa
