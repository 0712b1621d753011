"""The ops that differ in nothing but how a backend computes y, and the question of LoRA's own Function."""

from collections.abc import Callable
from types import ModuleType

from rosa_kernels.backends.gpu import library_ops


def linear_ops(linear: Callable, heuristics: ModuleType) -> tuple[Callable, Callable, Callable, Callable]:
    """rosa_linear, rosa_linear_with_H, spmm and lora_step_by_library.

    linear: takes rosa_linear's arguments and whether H is kept, and returns (y, H or None).
    heuristics: the backend's.
    """

    def rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
        y, _ = linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, False)
        return y

    def rosa_linear_with_H(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
        return linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, True)

    def spmm(x, values, crow, col, structure):
        y, _ = linear(x, None, None, None, None, 1.0, values, crow, col, structure, 0.0, None, False)
        return y

    def lora_step_by_library(x, lora_A, lora_B) -> bool:
        """Whether LORA_OPS serve y and all gradients of a frozen W and b, as the cheapest way."""
        choose, by_library = heuristics.choose_linear, heuristics.low_rank_gradients_by_library
        return library_ops.step_by_library(choose, by_library, x, lora_A, lora_B)

    return rosa_linear, rosa_linear_with_H, spmm, lora_step_by_library
