"""dA and dB: by the kernels, or by library GEMMs where launches would cost more than a second read of dy."""

from rosa_kernels.backends import lora_gemm
from rosa_kernels.backends.gpu import cost_model, device_rates, hardware
from rosa_kernels.backends.triton.lora import outer, shrink
from rosa_kernels.backends.triton.split_k import for_readers


def low_rank_gradients(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB):
    """As gpu_ops.Kernels says; dH as parts (parts, T, r)."""
    if dropout.seed is None and x.dtype == lora_A.dtype == lora_B.dtype:
        rates = device_rates.rates(x.device, hardware.target(x.device))
        if cost_model.low_rank_gradients_by_library(*dy.shape, x.element_size(), rates):
            dA, dB, dH = lora_gemm.low_rank_gradients(dy, x, lora_A, lora_B, scaling, need_dx, need_dA, need_dB)
            return dA, dB, None if dH is None else dH[None]
    dA = dB = dH = None
    dH_readers = x.shape[1] * (need_dx + need_dA)
    if need_dB:
        H = for_readers(shrink(x, lora_A, dropout), dy.shape[1])
        by_the_way = (need_dx or need_dA) and cost_model.dy_read_once(lora_B.shape[1])
        dB, dH = outer(dy, H, lora_B, scaling, features_first=True, Q=lora_B if by_the_way else None)
        dH = None if dH is None else for_readers(dH, dH_readers)
    if need_dA:
        if dH is None:
            dH = for_readers(shrink(dy, lora_B.T), dH_readers)
        dA, _ = outer(x, dH, lora_A, scaling, features_first=False, dropout=dropout)
    return dA, dB, dH
