// The library's GEMMs, by way of PyTorch's C shim: past its dispatcher, into room that is there, with alpha and beta.
//
// PyTorch's functions for CUDA tensors lie in a library that a PyTorch without CUDA does not have. So they are looked
// up when they are first needed.
#pragma once
#include "gpu/tensors.h"

namespace rosa {

// Whether this PyTorch has the functions for CUDA tensors.
bool has_cuda_gemms();

// out = beta · c + alpha · a b; c is out, or a vector or matrix that broadcasts to it. Where beta is 0, c is not read.
void gemm(Tensor& out, const Tensor& c, const Tensor& a, const Tensor& b, double beta, double alpha);

// out = a b
void gemm(Tensor& out, const Tensor& a, const Tensor& b);

// The fp32 sums of a b, whose dtype they need not have.
Tensor fp32_product(const Tensor& a, const Tensor& b);

}  // namespace rosa
