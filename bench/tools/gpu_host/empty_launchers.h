// Launchers of csrc/cuda that count their kernels in place of launching them. gpu_host/builds.py defines one for each
// `cudaError_t name(const Operation&, cudaStream_t);` that a header of csrc/cuda declares.
#pragma once
#include <type_traits>

#include "cuda/kernels.h"

extern "C" {
__attribute__((visibility("default"))) long kernel_launches = 0;
}

// An operation in several splits takes a second kernel, which adds their sums.
template <typename Operation, typename = void>
struct Kernels {
  static int of(const Operation&) { return 1; }
};
template <typename Operation>
struct Kernels<Operation, std::void_t<decltype(Operation::splits)>> {
  static int of(const Operation& operation) { return operation.splits > 1 ? 2 : 1; }
};

template <typename Operation>
cudaError_t count(const Operation& operation) {
  kernel_launches += Kernels<Operation>::of(operation);
  return cudaSuccess;
}

const char* rosa::build_info() { return "empty launchers"; }
