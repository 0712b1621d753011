// Whether the index tensors of S hold what the kernels rely on: entries are counted and columns are addresses, and a
// structure promises equal rows. Reading them takes as long as there are entries, so that calls whose pattern is
// checked already leave it out. Each function returns what is wrong, in words that begin with the argument's name, or
// nothing.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#include "cpu/common/kernels.h"

namespace rosa {
namespace {

std::string at(const char* what, int64_t where) { return std::string(what) + " " + std::to_string(where); }

// The bounds of each line (a row, or of the transpose a column) count from 0 to nnz.
std::string bounds_fault(const char* name, const int32_t* bounds, int64_t lines, int64_t nnz) {
  const std::string start = std::string(name) + ": expected to ";
  if (bounds[0] != 0) return start + "start at 0, got " + std::to_string(bounds[0]);
  for (int64_t i = 0; i < lines; ++i)
    if (bounds[i + 1] < bounds[i]) return start + at("rise, got a fall at", i);
  if (bounds[lines] != nnz) return start + at("end at nnz =", nnz) + ", got " + std::to_string(bounds[lines]);
  return {};
}

// Each line's indices rise and are below `size`.
std::string lines_fault(const char* name, const int32_t* bounds, const int32_t* indices, int64_t lines, int64_t size) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t e = bounds[i]; e < bounds[i + 1]; ++e) {
      if (indices[e] < 0 || indices[e] >= size)
        return std::string(name) + at(": expected indices from 0 to below", size) + at(", got", indices[e]);
      if (e > bounds[i] && indices[e] <= indices[e - 1])
        return std::string(name) + at(": expected to rise within each row and column, got a fault at entry", e);
    }
  return {};
}

bool same_columns(const Csr& s, int64_t i, int64_t j) {
  const int64_t length = s.crow[i + 1] - s.crow[i];
  return s.crow[j + 1] - s.crow[j] == length &&
         std::memcmp(s.col + s.crow[i], s.col + s.crow[j], sizeof(int32_t) * length) == 0;
}

// Whether row i consists of whole runs of 16 columns, of which the last feature may cut one short.
bool whole_runs(const Csr& s, int64_t i, int64_t in_features) {
  for (int64_t e = s.crow[i]; e < s.crow[i + 1]; e += 16) {
    const int64_t first = s.col[e], last = first + 15 < in_features ? first + 15 : in_features - 1;
    if (first % 16 != 0 || e + last - first >= s.crow[i + 1] || s.col[e + last - first] != last) return false;
  }
  return true;
}

// The rows are right already. A block structure that is not BLOCK16 promises nothing: its kernels compare the columns.
std::string structure_fault(const Csr& s, int64_t out_features, int64_t in_features) {
  for (int64_t i = 0; i < out_features; ++i) {
    const int64_t length = s.crow[i + 1] - s.crow[i];
    if (s.structure == Structure::row && length != 0 && length != in_features)
      return at("structure: expected whole rows, got entries in a part of row", i);
    if (s.structure == Structure::column && !same_columns(s, 0, i))
      return at("structure: expected whole columns, got other columns in row", i);
    if (s.structure == Structure::block16 && !(i % 16 ? same_columns(s, i - 1, i) : whole_runs(s, i, in_features)))
      return at("structure: expected blocks of 16 x 16, got others in row", i);
  }
  return {};
}

std::string csr_fault(const Csr& s, int64_t out_features, int64_t in_features) {
  std::string fault = bounds_fault("crow", s.crow, out_features, s.nnz);
  if (fault.empty()) fault = lines_fault("col", s.crow, s.col, out_features, in_features);
  if (fault.empty()) fault = structure_fault(s, out_features, in_features);
  return fault;
}

// S is right already. ccol, row and permutation are its transpose where entry k by columns is entry permutation[k] by
// rows: no two entries of S share a place, so that no two k then share an entry.
std::string transpose_fault(const Csr& s, const int32_t* ccol, const int32_t* row, const int32_t* permutation,
                            int64_t out_features, int64_t in_features) {
  std::string fault = bounds_fault("ccol", ccol, in_features, s.nnz);
  if (fault.empty()) fault = lines_fault("row", ccol, row, in_features, out_features);
  for (int64_t j = 0; fault.empty() && j < in_features; ++j)
    for (int64_t k = ccol[j]; k < ccol[j + 1]; ++k) {
      const int64_t e = permutation[k];
      const bool in_range = e >= 0 && e < s.nnz;
      if (!in_range || s.col[e] != j || e < s.crow[row[k]] || e >= s.crow[row[k] + 1])
        return at("permutation: expected the place by rows of each entry by columns, got another one at", k);
    }
  return fault;
}

}  // namespace
}  // namespace rosa
