"""python -m rosa_kernels: which backends run on this machine, what the others lack, and who serves which dtype."""

import platform

import torch

import rosa_kernels
from rosa_kernels import direct_call, dispatch
from rosa_kernels.backends import cpu, cuda, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    return found


def service_table() -> str:
    """For each device and dtype a row with the backend that "auto" chooses for all ops."""
    lines = [f"{'device':<8}{'dtype':<10}backend"]
    for device in devices():
        for dtype in DTYPES:
            name = dispatch.automatic_choice(device, dtype)
            lines.append(f"{device.type:<8}{str(dtype).removeprefix('torch.'):<10}{name}")
    return "\n".join(lines)


def main() -> None:
    print(f"rosa_kernels {rosa_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"threads: {torch.get_num_threads()}\n\nbackends")
    for name, reason in dispatch.available_backends().items():
        print(f"  {name:<10} {'ready' if reason is None else 'not available: ' + reason}")
    if cpu.unavailable_reason() is None:
        own = [str(dtype).removeprefix("torch.") for dtype in DTYPES[:2] if cpu.uses_our_gemm(dtype)]
        base = f", our GEMM in {' and '.join(own)}" if own else ""
        print(f"  cpu kernels: {cpu.instruction_set()} in use{base}; {cpu.build_info()}")
    if cuda.unavailable_reason() is None:
        print(f"  cuda kernels: {cuda.build_info()}")
    if direct_call.missing_names:
        names = ", ".join(f"torch.{name}" for name in direct_call.missing_names)
        print(f"  every call goes through PyTorch's dispatcher, 10 us more: this PyTorch has no {names}")
    if triton.missing_names() and triton.unavailable_reason() is None:
        names = ", ".join(f"triton.{name}" for name in triton.missing_names())
        print(f"  every launch goes through Triton's Python, 30 us more: this Triton has no {names}")
    print('\nwith backend "auto"')
    print(service_table())


if __name__ == "__main__":
    main()
