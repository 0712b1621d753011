"""dA and dB, and dH on the way: by library GEMMs, or by the backend's kernels."""

from torch import Tensor

from rosa_kernels.backends import lora_gemm
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.backend import GpuBackend
from rosa_kernels.backends.gpu.operands import Dropout


def low_rank_gradients(
    backend: GpuBackend, dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout,
    need_dx: bool, need_dA: bool, need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dA, dB, dH), None each where it is not needed. dH = dy B in the backend's form, where it was made on the way."""
    if dropout.seed is None and x.dtype == lora_A.dtype == lora_B.dtype:
        rates = device_rates.rates(x.device, hardware.architecture(x.device))
        if backend.heuristics.low_rank_gradients_by_library(*dy.shape, x.element_size(), rates):
            dA, dB, dH = lora_gemm.gradients_by_library(dy, x, lora_A, lora_B, scaling, need_dx, need_dA, need_dB)
            return dA, dB, None if dH is None else backend.H_of_matrix(dH)
    return backend.gradients_by_kernels(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB)
