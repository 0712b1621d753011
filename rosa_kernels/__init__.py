"""Kernels for low-rank and sparse adapters: y = x Wᵀ + b + scaling · x Aᵀ Bᵀ + x Sᵀ."""

from rosa_kernels import ops  # noqa: F401  registers torch.ops.rosa_kernels first
from rosa_kernels.dispatch import available_backends, use_backend
from rosa_kernels.functional import csr_add, lora_linear, rosa_delta, rosa_linear, sddmm, sparse_linear, spmm
from rosa_kernels.pattern import CSRPattern

__version__ = "0.1.0"
__all__ = [
    "CSRPattern",
    "available_backends",
    "csr_add",
    "lora_linear",
    "rosa_delta",
    "rosa_linear",
    "sddmm",
    "sparse_linear",
    "spmm",
    "use_backend",
]
