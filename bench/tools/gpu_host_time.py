"""What a call of the GPU backends costs the host, measured on a machine without a GPU.

    python bench/tools/gpu_host_time.py --json FILE      every algorithm, some three minutes
    python bench/tools/gpu_host_time.py --only lora      the lines whose name has this in it
    python bench/tools/gpu_host_time.py --quick          few rounds, to see that it runs

Each line is one case (gpu_host/cases.py): the whole step, forward and backward, of the function of rosa_kernels.
"forward" is the forward without gradients, "module" the layer of rosa_kernels.nn. Beside it stand the fastest
hand-written PyTorch (gpu_host/by_hand.py) and, for LoRA's modules, PEFT's. Their results are compared where both
compute. "launches" counts this package's kernels, and "ATen" PyTorch's ops, without views and allocations. The
GEMMs of LoRA's own op a pass, which lies in the binary of the CPU kernels, are not among them.

Tiny CPU tensors stand for CUDA tensors, and the algorithms are those that an H100 would take at real sizes
(gpu_host/plans.py). Triton's own launcher runs over a libcuda that does nothing, and the CUDA backend's C++ around
kernels that do nothing. So the results of lines with launches are not numbers. The C++ converts 16-bit operands of an
fp32 product, which it need not on a GPU: two calls more for rows on "cuda". Left out for all alike are the driver's
launch, PyTorch's look-up of the stream, its GPU allocator, and the thread in which a GPU's backward runs.

One thread, candidates in turn within each round; a figure is the tenth percentile of the rounds, in us.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rosa_kernels as rk
from gpu_host import builds, stand_ins
from gpu_host.by_hand import by_hand
from gpu_host.cases import CASES, RANK, Case, TinyLayer
from gpu_host.plans import Plan
from interleaved import WallClock, aligned, gradients
from layers import SCALING
from rosa_kernels import direct_call

try:
    import peft
except ImportError:
    peft = None

_FOLDER = "ROSA_KERNELS_GPU_HOST"
"""The environment variable that names the folder of the stand-ins, in the process that measures."""
_ALLOCATES = ("aten::empty", "aten::new_empty")


class Counters(NamedTuple):
    launches: stand_ins.Counter
    gemms: stand_ins.Counter
    """Those that the CUDA backend takes from the C shim, which no mode sees."""


class ATenCalls(TorchDispatchMode):
    def __init__(self):
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("aten::") and not function.is_view and not name.startswith(_ALLOCATES):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def ours(case: Case, layer: TinyLayer) -> Callable:
    x, W, b, A, B, values, pattern = (
        layer.x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.values, layer.pattern,
    )  # fmt: skip
    if not case.has_sparse:
        return lambda: rk.lora_linear(x, W, b, A, B, SCALING, dropout_p=case.dropout_p)
    if not case.has_base:
        return lambda: rk.rosa_delta(x, A, B, SCALING, values, pattern)
    return lambda: rk.rosa_linear(x, W, b, A, B, SCALING, values, pattern, dropout_p=case.dropout_p)


def base_layer(layer: TinyLayer) -> torch.nn.Linear:
    base = torch.nn.Linear(*reversed(layer.weight.shape), dtype=layer.x.dtype)
    base.weight.data, base.bias.data = layer.weight, layer.bias
    return base


def our_module(case: Case, layer: TinyLayer) -> tuple[Callable, list[torch.Tensor]]:
    """Returns its forward, and the leaves."""
    settings = {"r": RANK, "lora_alpha": SCALING * RANK, "lora_dropout": case.dropout_p}
    if case.has_sparse:
        module = rk.nn.RoSALinear(base_layer(layer), pattern=layer.pattern, **settings)
    else:
        module = rk.nn.LoRALinear(base_layer(layer), **settings)
    values = [module.sparse_values] if case.has_sparse else []
    return lambda: module(layer.x), with_values_of(layer, [*module.low_rank_factors(), *values])


def with_values_of(layer: TinyLayer, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Returns the leaves: x and the parameters, which have become the layer's A, B and values."""
    for parameter, tensor in zip(parameters, layer.leaves[1:], strict=True):
        parameter.data = tensor.detach().clone()
    return [layer.x, *parameters]


def peft_module(case: Case, layer: TinyLayer) -> tuple[Callable, list[torch.Tensor]]:
    settings = {"r": RANK, "lora_alpha": int(SCALING * RANK), "lora_dropout": case.dropout_p}
    config = peft.LoraConfig(target_modules=["0"], **settings)
    model = torch.nn.Sequential(base_layer(layer))
    module = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    factors = [module.lora_A["default"].weight, module.lora_B["default"].weight]
    return lambda: module(layer.x), with_values_of(layer, factors)


def lines(case: Case) -> dict[str, dict[str, Callable]]:
    """{name of a line: {"ours", "by_hand" and perhaps "peft": a call}}."""
    layer = TinyLayer(case)
    forwards = {"": {"ours": (ours(case, layer), layer.leaves), "by_hand": (by_hand(case, layer), layer.leaves)}}
    if case.has_module:
        forwards["module"] = {"ours": our_module(case, layer), "by_hand": (by_hand(case, layer), layer.leaves)}
        if case.op == "lora" and peft is not None:
            forwards["module"]["peft"] = peft_module(case, layer)
    made = {}
    for what, candidates in forwards.items():
        for kind in ("", "forward") if case.has_step else ("forward",):
            calls = {
                name: torch.no_grad()(forward) if kind else gradients(forward, leaves, layer.dy)
                for name, (forward, leaves) in candidates.items()
            }
            made[" ".join(filter(None, (case.name, kind, what)))] = calls
    return made


def check_results(case: Case, name: str, candidates: dict[str, Callable], launches: int) -> None:
    """A call that gives something else may cost anything. Ours is no number where a kernel did nothing."""
    if case.dropout_p:
        return
    layer = TinyLayer(case)
    with rk.use_backend("reference"):
        expected = gradients(ours(case, layer), layer.leaves, layer.dy)()
    for candidate, call in candidates.items():
        if candidate == "ours" and launches:
            continue
        results = call()
        for got, right in zip(results if isinstance(results, tuple) else (results,), expected):
            error = float((got.float() - right.float()).norm() / right.float().norm())
            if error > 2e-2 or got.dtype != right.dtype:
                raise RuntimeError(f"{name}: {candidate} differs by {error:.2g}")


def measured(candidates: dict[str, Callable], rounds: int, calls: int) -> dict[str, float]:
    """Microseconds a call."""
    timer, names = WallClock(), list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for call in candidates.values():
        timer(call, 2 * calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(timer(candidates[name], calls) / calls)
    finally:
        gc.enable()
    return {name: statistics.quantiles(samples, n=10)[0] * 1e6 for name, samples in seconds.items()}


def counted(call: Callable, counters: Counters) -> dict[str, int]:
    """In a call that goes past the dispatcher, as it does when nothing counts."""
    needs_dispatcher = direct_call.needs_dispatcher
    direct_call.needs_dispatcher = lambda args: False
    try:
        launches, gemms = counters.launches(), counters.gemms()
        with ATenCalls() as aten:
            call()
        gemms = counters.gemms() - gemms
        return {"launches": counters.launches() - launches, "aten_calls": len(aten.names) + gemms}
    finally:
        direct_call.needs_dispatcher = needs_dispatcher


def steps_of(case: Case, counters: Counters, rounds: int, calls: int) -> list[dict]:
    steps = []
    plan = Plan(case)
    with rk.use_backend(case.backend), plan.forced():
        for name, candidates in lines(case).items():
            candidates["ours"]()
            counts = counted(candidates["ours"], counters)
            check_results(case, name, candidates, counts["launches"])
            us = measured(candidates, rounds, calls)
            step = {"name": name, "ours_us": us["ours"], "by_hand_us": us["by_hand"]}
            step["ratio"] = us["ours"] / us["by_hand"]
            if "peft" in us:
                step["peft_us"] = us["peft"]
            steps.append(step | counts)
    plan.check_asked()
    for step in steps:
        step["algorithms"] = plan.decided
    return steps


def _words(algorithms: dict) -> str:
    """Of y, dx and dS."""
    parts = (algorithms[part] for part in ("y", "dx", "dvalues") if part in algorithms)
    return "; ".join(part if isinstance(part, str) else " ".join(filter(None, part)) for part in parts)


def table(steps: list[dict]) -> str:
    rows = [("us of the host", "ours", "by hand", "ratio", "PEFT", "launches", "ATen", "y; dx; dS")]
    for step in steps:
        peft_us = f"{step['peft_us']:.1f}" if "peft_us" in step else ""
        rows.append(
            (step["name"], f"{step['ours_us']:.1f}", f"{step['by_hand_us']:.1f}", f"{step['ratio']:.2f}", peft_us,
             str(step["launches"]), str(step["aten_calls"]), _words(step["algorithms"]))
        )  # fmt: skip
    return aligned(rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORDS",
        help="the cases whose name has this in it; may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: the figures mean little")
    return parser.parse_args()


def missing() -> str | None:
    if platform.system() != "Linux":
        return f"its stand-ins are written for Linux, not {platform.system()}"
    if builds.c_compiler() is None or builds.cxx_compiler() is None:
        return "no C and C++ compiler is found (CC, cc, gcc, clang; CXX, c++, g++, clang++)"
    return None


def main() -> None:
    options = parse_options()
    if (reason := missing()) is not None:
        sys.exit(f"gpu_host_time: {reason}")
    if _FOLDER not in os.environ:
        restart_over_stand_ins()
    folder = Path(os.environ[_FOLDER])
    measure(options, folder)


def restart_over_stand_ins() -> None:
    """The dynamic linker reads LD_LIBRARY_PATH when a process starts, so the measuring is another one's."""
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        builds.build_libcuda(Path(folder))
        environment = os.environ | {
            _FOLDER: folder,
            "TRITON_LIBCUDA_PATH": folder,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))),
        }
        environment.pop("TRITON_INTERPRET", None)
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)


def measure(options: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = [case for case in CASES if any(words in case.name for words in options.only or [""])]
    if not chosen:
        sys.exit(f"gpu_host_time: no case has {' or '.join(map(repr, options.only))} in its name")
    cuda_library = builds.build_cuda_backend(folder) if any(case.backend == "cuda" for case in chosen) else None
    stand_ins.install(cuda_library)
    launches = stand_ins.Counter("kernel_launches", folder / "libcuda.so.1", cuda_library)
    counters = Counters(launches, stand_ins.Counter("gemm_calls", cuda_library))
    if peft is None:
        print("PEFT's modules are left out: peft is not installed")
    steps = []
    for case in chosen:
        steps += steps_of(case, counters, *((10, 2) if options.quick else (200, 10)))
    print(table(steps))
    if options.json:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "quick": options.quick, "steps": steps}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
