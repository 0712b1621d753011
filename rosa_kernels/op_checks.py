"""What reaches an op through PyTorch's dispatcher: the arguments of anybody's call, or of an exported program.

Every op has a function of its name here, which raises ValueError or TypeError where a kernel would read what is not
there. It takes the op's arguments.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rosa_kernels import checks, transforms
from rosa_kernels.backends.kept_H import H_dtype, padded_rank
from rosa_kernels.backends.shapes import tokens_of
from rosa_kernels.pattern import STRUCTURE_NUMBERS, UNSTRUCTURED, CSRPattern, has_structure


def rosa_linear(
    x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, ccol, row, permutation
):
    checks.check_type("x", x, Tensor)
    pattern = _optional_pattern(x, crow, col, structure, ccol, row, permutation)
    if not checks.linear_fits(x, weight, bias, lora_A, lora_B, values, pattern):
        checks.check_linear_types(x, weight, bias, lora_A, lora_B, values, pattern)
        checks.check_linear(x, weight, bias, lora_A, lora_B, values, pattern)
    checks.check_dropout_p(dropout_p)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(f"seed: expected one int64 on {x.device}, got {_describe(seed)}")


def rosa_linear_with_H(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    rosa_linear(
        x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, None, None, None
    )
    if lora_A is None:
        raise ValueError("lora_A: expected a tensor, as H = x lora_Aᵀ is asked for")


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H,
):  # fmt: skip
    checks.check_type("dy", dy, Tensor)
    rosa_linear(
        x, weight, None, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, ccol, row, permutation
    )
    checks.check_output_gradient(dy, x, lora_B.shape[0] if values is None else crow.shape[0] - 1)
    if values is not None and ccol is None:
        raise ValueError("ccol, row and permutation: expected what CSRPattern.transpose makes of crow and col")
    for need, name, tensor in zip(needs[3:], ("lora_A", "lora_B", "values"), (lora_A, lora_B, values)):
        if need and tensor is None:
            raise ValueError(f"needs: expected no gradient of {name}, which is None")
    if H is not None:
        _check_H(H, x, lora_A, lora_B)


def _check_H(H, x, lora_A, lora_B):
    if lora_A is None:
        raise ValueError("H: expected None, as lora_A is None")
    shape, dtype = (tokens_of(x), padded_rank(lora_A.shape[0])), H_dtype(x, lora_A, lora_B)
    if H.shape != shape or H.dtype != dtype or H.device != x.device or not H.is_contiguous():
        raise ValueError(f"H: expected contiguous {dtype} of shape {shape} on {x.device}, got {_describe(H)}")


def spmm(x, values, crow, col, structure, ccol, row, permutation):
    checks.check_type("x", x, Tensor)
    checks.check_spmm(x, values, _pattern(x, crow, col, structure, ccol, row, permutation))


def sddmm(dy, x, crow, col, structure, ccol, row, permutation):
    checks.check_type("x", x, Tensor)
    checks.check_sddmm(dy, x, _pattern(x, crow, col, structure, ccol, row, permutation))


def csr_add(weight, values, crow, col):
    checks.check_type("weight", weight, Tensor)
    checks.check_csr_add(weight, values, _pattern(weight, crow, col, UNSTRUCTURED, None, None, None))


def _optional_pattern(x, crow, col, structure, ccol, row, permutation):
    return None if crow is None and col is None else _pattern(x, crow, col, structure, ccol, row, permutation)


def _pattern(x, crow, col, structure, ccol, row, permutation):
    """The pattern of S, whose rows have x's last size."""
    if x.dim() < 1:
        raise ValueError("x: expected at least one dimension, got a 0-D tensor")
    tensors: tuple = (crow, col) if ccol is row is permutation is None else (crow, col, ccol, row, permutation)
    if transforms.active():
        tensors = tuple(None if tensor is None else transforms.unwrapped(tensor) for tensor in tensors)
    if not _are_known(tensors, x.shape[-1], structure):
        _check_tensors(tensors, x.device)
        if all(map(transforms.holds_numbers, tensors)) and not _captures_a_graph(x.device):
            _check_indices(tensors, x.shape[-1], structure)
            _remember(tensors, x.shape[-1], structure)
    return CSRPattern._trusted(crow, col, (crow.shape[0] - 1, x.shape[-1]), structure, None)


def _check_tensors(tensors, device):
    for name, tensor in zip(("crow", "col", "ccol", "row", "permutation"), tensors):
        fits = (
            tensor is not None
            and tensor.dtype == torch.int32
            and tensor.layout is torch.strided
            and tensor.dim() == 1
            and tensor.is_contiguous()
            and tensor.device == device
        )
        if not fits:
            raise ValueError(f"{name}: expected contiguous 1-D int32 indices on {device}, got {_describe(tensor)}")
    if tensors[0].shape[0] == 0:
        raise ValueError("crow: expected out_features + 1 indices, got none")


def _check_indices(tensors, in_features, structure):
    """Raises ValueError unless crow and col are a pattern of this structure, and the others the same by columns."""
    crow, col, *by_columns = tensors
    pattern = CSRPattern(crow, col, (crow.shape[0] - 1, in_features))
    if structure not in STRUCTURE_NUMBERS or not has_structure(pattern, structure):
        raise ValueError(f"structure: expected a number that is true of the indices, got {structure}")
    for name, tensor, right in zip(("ccol", "row", "permutation"), by_columns, pattern.transpose()):
        if not torch.equal(tensor, right):
            raise ValueError(f"{name}: expected what CSRPattern.transpose makes of crow and col")


def _captures_a_graph(device):
    """Whether a CUDA graph records this call, so that no host may read the indices.

    PyTorch runs a function once before it records it, and the indices were read then. It may record with copies of
    them, which nothing here knows.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Known(NamedTuple):
    """A set of index tensors that passed. Reading indices waits for a GPU, so that it is done once.

    PyTorch counts who writes to a tensor, and the tensor is read again then. It does not count writes to ``.data`` and
    to the memory that NumPy or DLPack shares, which nobody notices here.
    """

    in_features: int
    structure: int
    others: tuple[weakref.ref, ...]  # all but crow
    states: list[tuple[int, int, int]]


_known = WeakTensorKeyDictionary()  # crow: _Known


def _are_known(tensors, in_features, structure):
    if tensors[0] is None:
        return False
    known = _known.get(tensors[0])
    return (
        known is not None
        and known.in_features == in_features
        and known.structure == structure
        and len(known.states) >= len(tensors)
        and all(other() is tensor for other, tensor in zip(known.others, tensors[1:]))
        and known.states[: len(tensors)] == [_state(tensor) for tensor in tensors]
    )


def _remember(tensors, in_features, structure):
    if any(tensor.is_inference() for tensor in tensors):  # nothing counts the writes to these
        return
    others = tuple(map(weakref.ref, tensors[1:]))
    _known[tensors[0]] = _Known(in_features, structure, others, [_state(tensor) for tensor in tensors])


def _state(tensor):
    """What changes when a tensor is written to, or gets other memory or another size."""
    return tensor._version, tensor.data_ptr(), tensor.shape[0]


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
