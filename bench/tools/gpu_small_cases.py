"""Every op and its backward once on small tensors of odd sizes: what gpu_check.sh has compute-sanitizer watch.

    python bench/tools/gpu_small_cases.py                           the Triton and the CUDA kernels on the GPU
    python bench/tools/gpu_small_cases.py --backends cuda           one backend
    python bench/tools/gpu_small_cases.py --device cpu --backends cpu

Each result is compared with the reference backend's. It ends with an error where one differs or a backend is missing.
"""

import argparse
import itertools
import sys

import torch

import rosa_kernels as rk

TOKENS, IN_FEATURES, OUT_FEATURES, R, SCALING, DROPOUT_P = 37, 70, 50, 5, 0.5, 0.3
DTYPES = (torch.float32, torch.bfloat16)
ERROR = {torch.float32: 2**-16, torch.bfloat16: 2**-5}
"""Of the largest number of a result. A wrong address or mask is far outside."""


def patterns(device: str) -> dict[str, rk.CSRPattern | None]:
    shape = OUT_FEATURES, IN_FEATURES
    blocks = torch.zeros(4, 5, dtype=torch.bool)
    blocks[1, 2] = blocks[3, 4] = True
    made = {
        "entries": rk.CSRPattern.random(shape, 0.1, seed=0),
        "rows": rk.CSRPattern.from_rows(torch.tensor([3, 49]), shape),
        "columns": rk.CSRPattern.from_columns(torch.tensor([0, 69]), shape),
        "blocks": rk.CSRPattern.from_blocks(blocks, 16, shape),
    }
    return {"no S": None, **{name: pattern.to(device) for name, pattern in made.items()}}


def results(pattern: rk.CSRPattern | None, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """{name: result} of the layer's forward and backward, and where there is an S of the single ops."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (TOKENS, IN_FEATURES), "A": (R, IN_FEATURES), "B": (OUT_FEATURES, R), "values": (1,)}
    sizes["values"] = (0 if pattern is None else pattern.nnz,)
    leaves = {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}
    x, A, B, values = (leaf.requires_grad_() for leaf in leaves.values())
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator).to(device, dtype)
    dy = torch.randn(TOKENS, OUT_FEATURES, generator=generator).to(device, dtype)
    torch.manual_seed(1)  # every backend draws the same dropout mask
    if pattern is None:
        y = rk.lora_linear(x, weight, None, A, B, SCALING, dropout_p=DROPOUT_P)
        return {"y": y, **_gradients(y, {"x": x, "A": A, "B": B}, dy)}
    y = rk.rosa_linear(x, weight, None, A, B, SCALING, values, pattern, dropout_p=DROPOUT_P)
    product = rk.spmm(x, values, pattern)
    return {
        "y": y,
        **_gradients(y, {"x": x, "A": A, "B": B, "values": values}, dy),
        "spmm": product,
        **{f"spmm {name}": g for name, g in _gradients(product, {"x": x, "values": values}, dy).items()},
        "sddmm": rk.sddmm(dy, x.detach(), pattern),
        "csr_add": rk.csr_add(weight, values.detach(), pattern),
    }


def _gradients(y: torch.Tensor, leaves: dict[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"d{name}": g for name, g in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy))}


def differing(backend: str, device: str) -> list[str]:
    """The cases in which a backend's results are not the reference's."""
    found = []
    for (name, pattern), dtype in itertools.product(patterns(device).items(), DTYPES):
        with rk.use_backend("reference"):
            expected = results(pattern, dtype, device)
        with rk.use_backend(backend):
            got = results(pattern, dtype, device)
        for result, tensor in expected.items():
            error = (got[result] - tensor).abs().max().item() / tensor.abs().max().item()
            if not error <= ERROR[dtype]:
                found.append(f"{backend}, {dtype}, {name}: {result} is off by {error:.2g} of its largest number")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--backends", nargs="+", default=["triton", "cuda"], metavar="NAME", help="default: triton cuda"
    )
    options = parser.parse_args()
    for backend in options.backends:
        if reason := rk.available_backends()[backend]:
            sys.exit(f"backend {backend}: {reason}")
        if found := differing(backend, options.device):
            sys.exit("\n".join(found))
        print(f"{backend}: {len(patterns(options.device)) * len(DTYPES)} cases as the reference's")


if __name__ == "__main__":
    main()
