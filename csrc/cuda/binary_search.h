// Binary searches in a CSR pattern.
#pragma once
#include "cuda/platform.h"

namespace rosa {

// The row that holds an entry: the last with crow[row] <= entry, where crow[0] <= entry < crow[rows].
__device__ __forceinline__ int64_t row_of_entry(const int32_t* crow, int64_t rows, int64_t entry) {
  int64_t low = 0, high = rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (crow[middle] <= entry)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The first of a row's entries [first, end) whose column is at least `column`; `end` where there is none.
__device__ __forceinline__ int64_t first_entry_at(const int32_t* col, int64_t first, int64_t end, int64_t column) {
  while (first < end) {
    const int64_t middle = (first + end) / 2;
    if (col[middle] < column)
      first = middle + 1;
    else
      end = middle;
  }
  return first;
}

}  // namespace rosa
