"""LoRA by library GEMMs in one op a pass, as the GPU backends call it: here on CPU tensors."""

import pytest
import torch

from rosa_kernels.backends.cpu import binary
from rosa_kernels.backends.gpu import library_ops

pytestmark = pytest.mark.skipif(not binary.has_library_ops(), reason="the C++ kernels are not built")
T, K, N, R = 5, 24, 20, 3
FORWARD = ("x", "weight", "bias", "lora_A", "lora_B")


def tensors(dtype=torch.float32, leading=(T,), r=R):
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "x": (*leading, K),
        "weight": (N, K),
        "bias": (N,),
        "lora_A": (r, K),
        "lora_B": (N, r),
        "dy": (*leading, N),
    }
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def forward(t, keep_H=True):
    return library_ops.lora(*(t[name] for name in FORWARD), 0.5, keep_H)


def backward(t, H=None, needs=7):
    return library_ops.lora_backward(t["dy"], t["x"], t["weight"], t["lora_A"], t["lora_B"], H, 0.5, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("leading", [(T,), (2, T), (), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("r", [1, 16, 40])
def test_forward_and_backward(dtype, leading, biased, r):
    t = tensors(dtype, leading, r)
    t["bias"] = t["bias"] if biased else None
    y, H = forward(t)
    x, W, A, B = (t[name].double() for name in ("x", "weight", "lora_A", "lora_B"))
    x, dy = x.reshape(len(H), K), t["dy"].double().reshape(len(H), N)
    close = {"rtol": 3e-2, "atol": 3e-1} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-4}
    right = x @ W.T + 0.5 * (x @ A.T) @ B.T + (t["bias"].double() if biased else 0)
    torch.testing.assert_close(y.double(), right.reshape(y.shape), **close)
    torch.testing.assert_close(H[:, :r].double(), x @ A.T, **close)
    assert y.shape == (*leading, N) and y.dtype == dtype and y.is_contiguous()
    assert H.shape[1] % 16 == 0 and not H[:, r:].any()
    dH = 0.5 * dy @ B
    expected = (dy @ W + dH @ A).reshape(t["x"].shape), dH.T @ x, 0.5 * dy.T @ (x @ A.T)
    for kept in (H, None):
        for gradient, exact in zip(backward(t, kept), expected, strict=True):
            torch.testing.assert_close(gradient.double(), exact, **close)
            assert gradient.dtype == dtype and gradient.is_contiguous()


@pytest.mark.parametrize("needs", range(8))
def test_only_what_is_needed(needs):
    got = backward(tensors() | {"weight": None}, needs=needs)
    assert [gradient is not None for gradient in got] == [bool(needs >> bit & 1) for bit in range(3)]
    assert forward(tensors(), keep_H=False)[1] is None


def wrong(name, tensor):
    """(what, the tensor as it must not be)."""
    yield "three dimensions", tensor[None]
    yield "another dtype", tensor.double()
    yield "on meta", tensor.to("meta")
    yield "shorter", tensor[:, :-1] if name == "lora_A" else tensor[:-1]
    yield "sparse", tensor.to_sparse()


CASES = [
    pytest.param(name, changed, id=f"{name} {what}")
    for name, tensor in tensors().items()
    if name not in ("x", "dy")
    for what, changed in wrong(name, tensor)
]


@pytest.mark.parametrize("name,changed", CASES)
def test_what_does_not_fit_is_refused(name, changed):
    t = tensors() | {name: changed}
    with pytest.raises(RuntimeError, match="rosa_kernels_gpu: (weight|bias|lora_A|lora_B): expected"):
        forward(t)
    if name != "bias":
        with pytest.raises(RuntimeError, match="rosa_kernels_gpu: (weight|lora_A|lora_B): expected"):
            backward(t)


def test_H_and_dy_that_do_not_fit_are_refused():
    t = tensors()
    for H in (torch.zeros(T, 2), torch.zeros(T - 1, 16), torch.zeros(T, 16).double()):
        with pytest.raises(RuntimeError, match="H: expected"):
            backward(t, H)
    with pytest.raises(RuntimeError, match="dy: expected"):
        backward(t | {"dy": t["dy"][:-1]})
    with pytest.raises(RuntimeError, match="x: expected a tensor on a CPU or a GPU"):
        forward({name: tensor.to("meta") for name, tensor in t.items()})


def test_memory_that_is_missing_is_named():
    """In PyTorch's own words, and in its type where it is a GPU's."""
    t = tensors()
    with pytest.raises(RuntimeError, match="memory|has printed the reason"):
        forward(t | {"x": torch.zeros(1, K).expand(2**42, K)})
    raised = library_ops.as_pytorch_raises(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert isinstance(raised, torch.OutOfMemoryError) and "20.00 MiB" in str(raised)
    other = RuntimeError("something else")
    assert library_ops.as_pytorch_raises(other) is other
