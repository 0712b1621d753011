"""The CPU backend: C++ kernels for fp32 and bf16, around PyTorch's own GEMMs where those are the faster ones."""

from rosa_kernels.backends.cpu.binary import build_info, instruction_set, refusal, unavailable_reason, uses_our_gemm
from rosa_kernels.backends.cpu.ops import (
    KEEPS_H,
    LORA_OPS,
    csr_add,
    rosa_linear,
    rosa_linear_backward,
    rosa_linear_with_H,
    sddmm,
    spmm,
)

__all__ = [
    "KEEPS_H",
    "LORA_OPS",
    "build_info",
    "csr_add",
    "instruction_set",
    "refusal",
    "rosa_linear",
    "rosa_linear_backward",
    "rosa_linear_with_H",
    "sddmm",
    "spmm",
    "unavailable_reason",
    "uses_our_gemm",
]
