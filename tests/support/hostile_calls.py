"""Direct calls of torch.ops.rosa_kernels_cpu.* with wrong arguments: python tests/support/hostile_calls.py FIRST END

Call number n is a valid one of cpu_kernel_calls.py in which up to three arguments are changed; where n is a multiple of
10 none is. Each must raise, or give the numbers that plain PyTorch gives for the same arguments. Before each call its
number is printed, so that the last line names the call that killed the process. The end is a line of counts.
"""

import os
import random
import sys
from collections import Counter

import torch
from torch import Tensor

import cpu_emulation
from cpu_kernel_calls import BF16, GUARDED, NAMES, RESULTS, Call, expected, guards
from rosa_kernels.backends.cpu import binary

OTHER_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
HUGE = (2**31 - 1, 2**31, 2**40, 2**62)


def resized_storage(t: Tensor, _) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def another_size(t: Tensor, draw: random.Random) -> Tensor:
    """One more or one less along a dimension."""
    if t.dim() == 0:
        return t.reshape(1)
    i = draw.randrange(t.dim())
    size = t.shape[i] + draw.choice((-1, 1, 5))
    return t.repeat_interleave(6, i).narrow(i, 0, size).contiguous() if size >= 0 and t.numel() else t.new_zeros(3)


def another_index(t: Tensor, draw: random.Random) -> Tensor:
    """One number is another one."""
    t = t.clone(memory_format=torch.contiguous_format)
    if t.numel() and not t.is_complex():
        number = draw.choice((-1, 0, 1, 2, 15, 16, 17, t.numel(), 2**31 - 1, -(2**31)))
        t.view(-1)[draw.randrange(t.numel())] = number if t.dtype == torch.int32 else number % 7
    return t


def shuffled(t: Tensor, draw: random.Random) -> Tensor:
    order = list(range(t.shape[0])) if t.dim() else [0]
    draw.shuffle(order)
    return t[order].contiguous() if t.dim() else t


def overlapping(t: Tensor, _) -> Tensor:
    """Rows that begin one element after each other."""
    return t.reshape(-1).as_strided(t.shape, (1,) * t.dim()) if t.numel() >= sum(t.shape) else t[:0]


def huge(t: Tensor, draw: random.Random) -> Tensor:
    """Sizes that cost no memory."""
    size = draw.choice(HUGE)
    t = t if t.numel() else t.new_ones(1)
    if draw.random() < 0.5:
        return t.new_empty((size, 0) if draw.random() < 0.5 else (0, size))
    return t.reshape(-1)[:1].expand(size) if draw.random() < 0.5 else t[:1].expand(min(size, 2**40), *t.shape[1:])


CHANGES = {
    "None": lambda t, _: None,
    "another size": another_size,
    "another index": another_index,
    "shuffled": shuffled,
    "flipped": lambda t, _: t.flip(0) if t.dim() else t,
    "transposed": lambda t, _: t.mT if t.dim() > 1 else t,
    "transposed memory": lambda t, _: t.mT.contiguous().mT if t.dim() > 1 else t,
    "strided": lambda t, _: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "padded rows": lambda t, _: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t,
    "expanded": lambda t, _: t[:1].expand(t.shape) if t.dim() and t.numel() else t,
    "overlapping": overlapping,
    "more dimensions": lambda t, _: t[None],
    "fewer dimensions": lambda t, _: t.reshape(-1),
    "a number": lambda t, _: t.reshape(-1)[0] if t.numel() else t.new_zeros(()),
    "empty": lambda t, _: t[:0] if t.dim() else t,
    "huge": huge,
    "another dtype": lambda t, draw: t.to(draw.choice(OTHER_DTYPES)),
    "meta": lambda t, _: t.to("meta"),
    "sparse": lambda t, _: t.float().to_sparse(),
    "sparse CSR": lambda t, _: t.float().to_sparse_csr() if t.dim() == 2 else t.float().to_sparse(),
    "mkldnn": lambda t, _: torch.ones(2, 2).to_mkldnn(),
    "resized storage": resized_storage,
}
NUMBERS = {
    int: (-1, 0, 1, 2, 3, 4, 5, 16, 17, 2**32, 2**32 + 1, *HUGE, 2**63 - 1, -(2**63), -(2**31)),
    float: (0.0, -1.0, 0.5, 3.0),
    bool: (False, True),
}


def change(arguments: dict, draw: random.Random) -> str:
    """Changes one argument, and says how."""
    name = draw.choice(tuple(arguments))
    before = arguments[name]
    others = [key for key, value in arguments.items() if isinstance(value, Tensor)]
    if before is None or draw.random() < 0.05:
        other = draw.choice(others)
        arguments[name] = arguments[other] if before is None or isinstance(before, Tensor) else before
        return f"{name} = {other}"
    if not isinstance(before, Tensor):
        arguments[name] = draw.choice(NUMBERS[type(before)])
        return f"{name} = {arguments[name]}"
    if not _plain(before):
        return "nothing"  # changed already
    single = before.dtype == torch.int32 and draw.random() < 0.5
    how = "another index" if single else draw.choice(tuple(CHANGES))
    arguments[name] = CHANGES[how](before, draw)
    return f"{name}: {how}"


def fault(op: str, arguments: dict, checked: bool = False) -> tuple[str | None, str | None]:
    """Makes the call: (what is wrong with it, the error that it raised); a wrong call may do neither."""
    before = guards()
    plain = all(_plain(value) for value in arguments.values() if isinstance(value, Tensor))
    kept = {name: value.clone() if plain and isinstance(value, Tensor) else value for name, value in arguments.items()}
    try:
        returned = getattr(binary.kernels, op)(*arguments.values(), *((True,) if checked else ()))
    except (RuntimeError, MemoryError, ValueError, TypeError) as error:
        returned, message = None, f"{type(error).__name__}: {error}"
    else:
        message = None
    if any(not torch.equal(a, b) for a, b in zip(before, guards(), strict=True)):
        return "wrote beside a tensor", message
    if message is not None:
        return None, message
    if not plain:
        return None, None
    for name, right in expected(op, kept).items():
        got = returned if name == "" else arguments[name]
        close = 3e-2 if BF16 in (got.dtype, *(t.dtype for t in kept.values() if isinstance(t, Tensor))) else 1e-3
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        if got.shape != right.shape or not torch.allclose(got.double(), right, rtol=0, atol=close * scale):
            return f"{name or 'result'} is wrong by {(got.double() - right).abs().max() if right.numel() else 0}", None
    return None, None


def _plain(t: Tensor) -> bool:
    """Whether PyTorch itself may copy and change the tensor, in little time."""
    if (
        t.dtype == torch.float8_e4m3fn
        or t.layout is not torch.strided
        or t.device.type != "cpu"
        or max(t.numel(), *t.shape, 0) > 2**20
    ):
        return False
    last = t.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.numel() == 0 or last * t.itemsize <= t.untyped_storage().nbytes()


def made(number: int) -> tuple[str, dict, list[str]]:
    """The operator of call `number`, its arguments, and how they were changed."""
    GUARDED.clear()
    call = Call(number)
    draw = random.Random(-1 - number)
    changes = draw.choice((1, 1, 2, 3)) if number % 10 else 0
    return call.op, call.arguments, [change(call.arguments, draw) for _ in range(changes)]


def main(first: int, end: int) -> None:
    torch.set_num_threads(2)
    counts: Counter[str] = Counter()
    for number in range(first, end):
        op, arguments, changes = made(number)
        print(f"{number} {op} {changes}", flush=True)
        wrong, message = fault(op, arguments)
        if wrong is not None or (message and not changes):
            sys.exit(f"call {number}, {op} with {changes or 'valid arguments'}: {wrong or message}")
        counts["raised" if message else "right"] += 1
        if message:
            names = [name for name in (*NAMES[op], *RESULTS[op]) if name in message]
            counts["named"] += bool(names)
            if not names:
                print("unnamed:", message.splitlines()[0])
    print(f"{counts['right']} right, {counts['raised']} raised, {counts['named']} of them name an argument")


if __name__ == "__main__":
    if library := os.environ.get("CPU_EMULATED"):
        cpu_emulation.install(library)
    main(*map(int, sys.argv[1:]))
