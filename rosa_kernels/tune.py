"""python -m rosa_kernels.tune: measures this GPU for the Triton backend, in a few minutes, and remembers it.

It writes the rates that the heuristics count with (rosa_kernels/backends/triton/heuristics.py). For each kernel,
operand size and bucket of tokens it also writes which of the listed block sizes is the fastest. Later processes read
the file; delete it to go by data sheets again. Nothing is tuned during training: see
rosa_kernels/backends/triton/configs.py.
"""

import argparse

import torch

from rosa_kernels.backends import triton as backend
from rosa_kernels.backends.gpu import device_rates


def main(arguments: list[str] | None = None) -> None:
    description = __doc__.split("\n\n")[0].split(": ")[1]
    parser = argparse.ArgumentParser(prog="python -m rosa_kernels.tune", description=description)
    parser.add_argument("--device", default="cuda", help="the GPU to measure (default: cuda)")
    device = torch.device(parser.parse_args(arguments).device)
    if backend.triton is None:
        parser.exit(1, f"tune measures the Triton kernels: {backend.unavailable_reason()}\n")
    if device.type != "cuda":
        parser.exit(1, f"no GPU: {device}\n")
    if not torch.cuda.is_available():
        parser.exit(1, "tune measures CUDA and ROCm GPUs; there is none here\n")
    from rosa_kernels.backends.triton import autotune  # needs Triton

    device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    table = autotune.measure(device)
    path = device_rates.table_file(table["device"])
    device_rates.write_table(path, table)
    for rate, value in table["rates"].items():
        print(f"{rate:<18} {value:.3g}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
