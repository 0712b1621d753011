"""What a competent PyTorch user writes without this package, as fast as plain PyTorch ops allow.

HandWritten is a layer with a backward of its own, because autograd through torch.sparse gives dense gradients. It casts
fp32 adapters to x's dtype. Each class below computes the part of S in one of these forms:

CSR         torch.sparse and sampled_addmm; on a CPU they reject bf16, which is copied to fp32
Dense       S scattered into a copy of W, its gradient gathered from a dense dW; 16 bits round small values of S away
DenseApart  S scattered into zeros and multiplied on its own
Rows        three small GEMMs, for an S of whole rows

On a CPU without instructions for bf16, PyTorch's bf16 GEMMs are 8 to 130 times slower than its fp32 GEMMs. There these
layers, and the frozen layer that they are compared with, compute in fp32 between casts.
"""

import functools
import time

import torch
import torch.nn.functional as F
from torch.autograd import Function

from rosa_kernels import CSRPattern


class NoSparse:
    def weight(self, W, values):
        return W

    def add_to_y(self, y, x, values):
        pass

    def add_to_dx(self, dx, dy, values):
        pass

    def gradient(self, dy, x):
        return None


class CSR(NoSparse):
    """dtype is that of the products with S and Sᵀ. The gradient is fp32: sampled_addmm knows no 16-bit dtype."""

    def __init__(self, pattern: CSRPattern, dtype: torch.dtype = torch.float32):
        self.shape, self.dtype = pattern.shape, dtype
        self.indices = pattern.crow_indices, pattern.col_indices
        ccol, row, permutation = pattern.transpose()
        self.transposed_indices, self.permutation = (ccol, row), permutation.long()
        self.zeros = self._matrix(self.indices, torch.zeros(pattern.nnz, device=pattern.device), self.shape)

    @staticmethod
    def _matrix(indices, values, shape):
        return torch.sparse_csr_tensor(*indices, values, shape, check_invariants=False)

    def add_to_y(self, y, x, values):
        S = self._matrix(self.indices, values.to(self.dtype), self.shape)
        y += (S @ x.to(self.dtype).T).T

    def add_to_dx(self, dx, dy, values):
        St = self._matrix(self.transposed_indices, values[self.permutation].to(self.dtype), self.shape[::-1])
        dx += (St @ dy.to(self.dtype).T).T

    def gradient(self, dy, x):
        return torch.sparse.sampled_addmm(self.zeros, dy.float().T, x.float(), beta=0).values()


class Dense(NoSparse):
    def __init__(self, pattern: CSRPattern):
        self.flat = pattern.to_mask().flatten().nonzero()[:, 0]

    def weight(self, W, values):
        merged = W.clone()
        merged.view(-1).index_add_(0, self.flat, values.to(W.dtype))
        return merged

    def gradient(self, dy, x):
        return (dy.T @ x).view(-1)[self.flat]


class DenseApart(Dense):
    def __init__(self, pattern: CSRPattern):
        super().__init__(pattern)
        self.shape = pattern.shape

    def weight(self, W, values):
        return W

    def _matrix(self, values, dtype):
        S = torch.zeros(self.shape, dtype=dtype, device=values.device)
        S.view(-1)[self.flat] = values.to(dtype)
        return S

    def add_to_y(self, y, x, values):
        y.addmm_(x, self._matrix(values, x.dtype).T)

    def add_to_dx(self, dx, dy, values):
        dx.addmm_(dy, self._matrix(values, dx.dtype))


class Rows(NoSparse):
    def __init__(self, rows: torch.Tensor, in_features: int):
        self.rows, self.in_features = rows, in_features

    def _matrix(self, values, dtype):
        return values.view(-1, self.in_features).to(dtype)

    def add_to_y(self, y, x, values):
        y.index_add_(1, self.rows, x @ self._matrix(values, x.dtype).T)

    def add_to_dx(self, dx, dy, values):
        dx.addmm_(dy[:, self.rows], self._matrix(values, dx.dtype))

    def gradient(self, dy, x):
        return (dy[:, self.rows].T @ x).flatten()


@functools.cache
def bf16_is_slow(tokens: int, backward: bool = True) -> bool:
    """Whether bf16 GEMMs of so many tokens lose to fp32 GEMMs between casts on this CPU. A small weight tells."""
    x, W = torch.ones(min(tokens, 64), 512, dtype=torch.bfloat16), torch.ones(512, 512, dtype=torch.bfloat16)

    def seconds(multiply):
        return min(_timed(lambda: multiply(x, W)) for _ in range(5))

    widened = seconds(lambda a, b: (a.float() @ b.float().T).to(a.dtype))
    return widened < seconds(torch.matmul if backward else F.linear)


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def as_multiplied(x, *others, backward=True):
    """Returns the tensors in the dtype in which this device multiplies x fastest: fp32 where bf16 GEMMs are slow."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and bf16_is_slow(x.numel() // x.shape[-1], backward):
        return tuple(None if tensor is None else tensor.float() for tensor in (x, *others))
    return x, *others


def frozen_step(x, W, b, dy):
    """The frozen layer's own two GEMMs, which give y and dx."""
    wide_x, wide_dy, W, b = as_multiplied(x, dy, W, b)
    return F.linear(wide_x, W, b).to(x.dtype), (wide_dy @ W).to(x.dtype)


def frozen_forward(x, W, b):
    wide, W, b = as_multiplied(x, W, b, backward=False)
    return F.linear(wide, W, b).to(x.dtype)


def forward(x, W, b, A, B, scaling, values, sparse):
    """Returns y, the weight M that was multiplied (W, or a copy that holds S) and H = x Aᵀ or None."""
    M = sparse.weight(W, values)
    y = F.linear(x, M, b)
    H = None
    if A is not None:
        H = x @ A.to(x.dtype).T
        y.addmm_(H, B.to(x.dtype).T, alpha=scaling)
    sparse.add_to_y(y, x, values)
    return y, M, H


def spmm(x, values, sparse, out_features):
    y = x.new_zeros(len(x), out_features)
    sparse.add_to_y(y, x, values)
    return y


class HandWritten(Function):
    """y = x Wᵀ + b + scaling x Aᵀ Bᵀ + x Sᵀ, with gradients of x, A, B and values."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, scaling, values, sparse):
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, A, B, values)]
        dtype = x.dtype
        x, W, b, A, B, values = as_multiplied(x, W, b, A, B, values)
        y, M, H = forward(x, W, b, A, B, scaling, values, sparse)
        ctx.save_for_backward(x, M, A, B, values, H)
        ctx.scaling, ctx.sparse = scaling, sparse
        return y.to(dtype)

    @staticmethod
    def backward(ctx, dy):
        x, M, A, B, values, H = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = dy @ M
        dA = dB = None
        if A is not None:
            dH = (dy @ B.to(dy.dtype)).mul_(ctx.scaling)
            dA, dB = dH.T @ x, (dy.T @ H).mul_(ctx.scaling)
            dx.addmm_(dH, A.to(dy.dtype))
        ctx.sparse.add_to_dx(dx, dy, values)
        dvalues = ctx.sparse.gradient(dy, x)
        dx, dA, dB, dvalues = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((dx, dA, dB, dvalues), ctx.dtypes)
        )
        return dx, None, None, dA, dB, None, dvalues, None


def lora_as_peft(x, W, b, A, B, scaling):
    """PEFT's LoRA: three matmuls and an addition through autograd. x is cast to the adapters' dtype."""
    y = F.linear(x, W, b)
    return y + (F.linear(F.linear(x.to(A.dtype), A), B) * scaling).to(y.dtype)
