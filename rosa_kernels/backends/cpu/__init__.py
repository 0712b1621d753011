"""The CPU backend: C++ kernels for fp32 and bf16, around PyTorch's own GEMMs where those are the faster ones."""

from rosa_kernels.backends.cpu.binary import build_info, instruction_set, refusal, unavailable_reason, uses_our_gemm
from rosa_kernels.backends.cpu.ops import csr_add, rosa_linear, rosa_linear_backward, sddmm, spmm

__all__ = [
    "build_info",
    "csr_add",
    "instruction_set",
    "refusal",
    "rosa_linear",
    "rosa_linear_backward",
    "sddmm",
    "spmm",
    "unavailable_reason",
    "uses_our_gemm",
]
