"""Every Triton kernel compiled for GPUs that are not here: no spills, tensor cores for dots, loops that fetch ahead.

The default tier compiles one kernel for each of WHOLE. `--exhaustive` compiles a sample, whose size follows from what a
GPU has of its own: each configuration of its lists for LoRA and dS, what fills shared memory in each configuration, and
for WHOLE each variant in the default configuration. Of the launches that differ only in which parts they have, it takes
those with most. `--exhaustive --all-kernels` compiles all of everything().
`--compile-table bench/results/triton-compile-table.md` writes the table that is printed at the end.
"""

import ast
import dataclasses
import itertools
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed", exc_type=ModuleNotFoundError)

import torch
import triton
import triton.language as tl

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.triton import configs
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW, UNSTRUCTURED
from tiers import is_exhaustive
from triton_aot import CHIPS, UNITS, Compiled, KiB, Specialised, compile_for, missing_tools, specialise
from triton_launches import BF16, FP16, FP32, Case, Launch, recorded, with_most_parts

if reason := missing_tools():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.cases_by_tier

WHOLE = ("sm_80", "sm_90", "sm_100", "gfx942")
"""One GPU for each kind of tensor core."""
LISTS_OF = {"sm_86": "sm_120", "sm_89": "sm_120", "sm_103": "sm_100", "gfx90a": "gfx942", "other": "gfx942"}
"""GPUs whose lists are those of another, where each configuration is compiled."""
BUCKETS = (16, 32, 64, 512, 4096)
"""Tokens: one number for each bucket of the configurations."""
VARIANTS = [
    Case(structure=UNSTRUCTURED, bias=True, dropout_p=0.1),
    Case(structure=UNSTRUCTURED, tokens=4),
    Case(structure=UNSTRUCTURED, r=64, lora_dtype=FP32, values_dtype=FP32, dropout_p=0.1),
    Case(structure=ROW, r=64),
    Case(structure=COLUMN, r=64),
    Case(structure=BLOCK16, r=64),
    Case(structure=UNSTRUCTURED, dtype=FP32),
    Case(structure=UNSTRUCTURED, dtype=FP32, tf32=True),
    Case(structure=UNSTRUCTURED, out_features=770, in_features=771, r=17),
    Case(tokens=200, dtype=FP16, dropout_p=0.1),
]
LARGEST = [
    Case(structure=UNSTRUCTURED),
    Case(structure=UNSTRUCTURED, lora_dtype=FP32, values_dtype=FP32),
    Case(structure=COLUMN, values_dtype=FP32),
]


def sample(chip: str) -> list[Launch]:
    launches = []
    if chip not in LISTS_OF:
        both = [Case(tokens=tokens, structure=structure) for tokens in BUCKETS for structure in (None, UNSTRUCTURED)]
        of_lists = [launch for case in both for launch in recorded(case, chip)]
        launches += [launch for launch in of_lists if launch.name.startswith("sddmm") or not _has_S(launch)]
    for case in VARIANTS if chip in WHOLE else ():
        launches += recorded(case, chip, every_config=False)
    for case in LARGEST:  # what fills shared memory and registers
        launches += [launch for launch in recorded(case, chip, every_config=chip not in LISTS_OF) if _has_S(launch)]
    return with_most_parts([launch for launch in launches if launch.name != "linear" or _is_more_than_low_rank(launch)])


def _has_S(launch: Launch) -> bool:
    return launch.has("crow") or launch.has("S") or launch.has("values")


def _is_more_than_low_rank(launch: Launch) -> bool:
    return launch.has("weight") or launch.has("values")


def everything(chip: str) -> list[Launch]:
    cases = {
        Case(tokens, structure=structure, r=r, dtype=dtype, tf32=tf32)
        for tokens in BUCKETS
        for structure in (None, UNSTRUCTURED, ROW, COLUMN, BLOCK16)
        for r in (16, 64)
        for dtype, tf32 in ((BF16, False), (FP16, False), (FP32, False), (FP32, True))
        if not tf32 or CHIPS[chip].has_tf32
    }
    cases |= {dataclasses.replace(case, tokens=tokens) for case in VARIANTS for tokens in (4, 4096)}
    cases |= {Case(tokens, structure=0, r=r, base=False, dropout_p=0.1) for tokens in (4, 4096) for r in (0, 16)}
    cases |= {Case(tokens, r=r, rows_needed=False) for tokens in (4, 4096) for r in (16, 64)}
    return [launch for case in sorted(cases, key=repr) for launch in recorded(case, chip)]


def distinct(launches: list[Launch], chip: str) -> list[Specialised]:
    return list({(kernel := specialise(chip, launch)).key: kernel for launch in launches}.values())


def kernels_of(config) -> list[Specialised]:
    if not is_exhaustive(config):
        return [a_kernel(chip) for chip in WHOLE]
    choose = everything if config.getoption("--all-kernels") else sample
    return [kernel for chip in CHIPS for kernel in distinct(choose(chip), chip)]


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        kernels = kernels_of(metafunc.config)
        metafunc.parametrize("kernel", kernels, ids=unique([kernel.title for kernel in kernels]))


def unique(titles: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    for index, title in enumerate(titles):
        seen[title] = seen.get(title, 0) + 1
        titles[index] = title if seen[title] == 1 else f"{title} #{seen[title]}"
    return titles


class Compiler:
    """Compiles on two threads, ahead of the tests that ask; its results are the table."""

    def __init__(self, kernels: list[Specialised]):
        self._pool = ThreadPoolExecutor(2)
        self._futures: dict[tuple, Future] = {
            kernel.key: self._pool.submit(compile_for, kernel.chip, kernel.source, kernel.options) for kernel in kernels
        }
        self.finished: list[tuple[Specialised, Compiled]] = []
        self.gaps: set[str] = set()

    def __call__(self, kernel: Specialised) -> Compiled:
        compiled = self._futures[kernel.key].result()
        self.finished.append((kernel, compiled))
        return compiled

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pytest_terminal_summary(self, terminalreporter, config):
        terminalreporter.section("compiled Triton kernels")
        terminalreporter.write_line(table(self.finished))
        if file := config.getoption("--compile-table"):
            Path(file).write_text(table(self.finished) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def compiler(request, tmp_path_factory):
    """For the tests selected; in a cache of its own, so that all is compiled anew."""
    parse, alone = ast.parse, threading.Lock()

    def parse_alone(*arguments, **keywords):  # CPython 3.11 counts the depth of all threads' trees together
        with alone:
            return parse(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "parse", parse_alone)
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton-cache")))
        own = [item for item in request.session.items if item.path == request.path]
        wanted = [item.callspec.params["kernel"] for item in own if "kernel" in _parameters(item)]
        compiler = Compiler(wanted)
        request.config.pluginmanager.register(compiler)
        yield compiler
        compiler.close()


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


MLIR_TYPES = {FP32: "f32", BF16: "bf16", FP16: "f16"}


def expected_unit(chip: str, M: int, num_warps: int, full_precision: bool) -> str:
    """What should compute a dot of M rows of output."""
    if chip.startswith("gfx"):
        return "mfma"  # has fp32 in full precision too
    if chip == "other":
        return "fma" if full_precision else "wmma"
    if full_precision:
        return "fma"
    large = {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_103": "tcgen05"}
    return large[chip] if chip in large and M >= 64 and num_warps % 4 == 0 else "mma.sync"


def loop_operands(launch: Launch) -> int:
    """Operands that the kernel's main loop streams from memory, each at consecutive addresses."""
    if launch.name == "linear":
        streamed = sum(map(launch.has, ("weight", "S", "A")))
        return streamed + (streamed > 0)
    return {"shrink": 2, "sddmm_tiled": 2, "lora_grad": 2}.get(launch.name, 0)


def faults(kernel: Specialised, compiled: Compiled) -> list[str]:
    """All that is wrong with a kernel's code."""
    launch, chip = kernel.launch, kernel.chip
    full_precision = launch.operand == FP32 and launch.precision == "ieee"
    found = []
    if compiled.local_bytes or compiled.local_accesses or compiled.spills:
        found.append(
            f"{compiled.local_bytes} bytes of local memory, {compiled.local_accesses} accesses, {compiled.spills} spilt"
        )
    if compiled.shared > CHIPS[chip].shared_limit:
        found.append(f"{compiled.shared} bytes of shared memory, {chip} has {CHIPS[chip].shared_limit}")
    units = set()
    for dot in compiled.dots:
        unit = expected_unit(chip, dot.M, launch.options["num_warps"], full_precision)
        units.add(unit)
        if dot.operand != MLIR_TYPES[launch.operand]:
            found.append(f"{dot} multiplies {dot.operand}, not {MLIR_TYPES[launch.operand]}")
        if dot.unit != unit:
            found.append(f"{dot} is not {unit}")
    found += [f"no instruction of {unit}" for unit in units if not compiled.count(*UNITS[unit])]
    if not units - {"fma"} and compiled.tensor_core_instructions:
        found.append(f"{compiled.tensor_core_instructions} tensor-core instructions in a kernel that should have none")
    return found


WIDE_LOADS = [
    f"{memory}_load_{size}" for memory in ("global", "buffer") for size in ("dwordx", "lds_dwordx", "b64", "b128")
]
"""How AMD's instructions begin that load more than 4 bytes a thread."""


def slow_loops(kernel: Specialised, compiled: Compiled) -> list[str]:
    """What keeps the main loop from fetching ahead in 16-byte pieces, where sizes and strides allow it."""
    launch = kernel.launch
    operands, stages = loop_operands(launch), launch.options["num_stages"]
    if CHIPS[kernel.chip].gpu.backend == "hip" and launch.has("seed") and launch.arguments.get("DROPOUT") != "out":
        operands -= 1  # x is masked in registers: nothing to gain from shared memory
    if not launch.aligned or not operands:
        return []
    found = []
    if len(compiled.buffers) < operands:
        found.append(f"{len(compiled.buffers)} of {operands} operands are fetched ahead")
    if min(compiled.buffers, default=0) < stages - 1:
        found.append(f"buffers of {compiled.buffers} tiles for {stages} stages")
    if CHIPS[kernel.chip].gpu.backend == "hip":
        if not compiled.count(*WIDE_LOADS):
            found.append("no load takes more than 4 bytes")
    elif not _copies_by_element(launch, compiled) and compiled.wide_copies < compiled.copies:
        found.append(f"only {compiled.wide_copies} of {compiled.copies} copies into shared memory take 16 bytes")
    return found


def _copies_by_element(launch: Launch, compiled: Compiled) -> bool:
    """A loop over the columns of blocks gathers; tf32 operands, which wgmma and tcgen05 take in one order alone,
    turn."""
    if launch.arguments.get("SPARSE") == "blocks":
        return True
    return launch.precision == "tf32" and any(dot.unit in ("wgmma", "tcgen05") for dot in compiled.dots)


def _loop_fault(fault: str) -> bool:
    return any(words in fault for words in ("fetched ahead", "tiles for", "take 16 bytes"))


def _spills(fault: str) -> bool:
    return "local memory" in fault


GAPS = {
    "lora_grad turns z: it is fetched ahead into registers, or not at all beside dH, which reads it as it is": (
        lambda launch, chip, compiled, fault: launch.name == "lora_grad" and "1 of 2 operands" in fault
    ),
    "rows of H and B are short, 32 bytes at rank 16: a thread copies fewer than 16 of them in each stage": (
        lambda launch, chip, compiled, fault: (
            launch.has("H")
            and "take 16 bytes" in fault
            and compiled.copies - compiled.wide_copies <= 2 * launch.options["num_stages"]
        )
    ),
    "gfx950 copies 4 or 16 bytes a thread into shared memory: tiles of few tokens, with 8, take 4 or are not copied": (
        lambda launch, chip, compiled, fault: (
            chip == "gfx950" and launch.tokens <= 512 and ("fetched ahead" in fault or "more than 4 bytes" in fault)
        )
    ),
    "ptxas aims at an occupancy of its own and puts away up to 4 numbers that the loop does not use": (
        lambda launch, chip, compiled, fault: (
            _spills(fault) and compiled.local_bytes <= 16 and compiled.local_accesses <= 12
        )
    ),
}
"""What is known to fall short: of which kernels and faults. test_no_gap_is_closed says when one can go."""


def test_kernel(compiler, kernel):
    compiled = compiler(kernel)
    unexplained = []
    for fault in faults(kernel, compiled) + slow_loops(kernel, compiled):
        covering = (reason for reason, covers in GAPS.items() if covers(kernel.launch, kernel.chip, compiled, fault))
        gap = next(covering, None)
        compiler.gaps.add(gap)
        if gap is None:
            unexplained.append(fault)
    assert not unexplained, "; ".join(unexplained)


@pytest.mark.exhaustive
def test_no_gap_is_closed(compiler):
    whole = sum(len(distinct(sample(chip), chip)) for chip in CHIPS)
    if len(compiler.finished) < whole:
        pytest.skip("needs the whole sample to have run")
    assert not set(GAPS) - compiler.gaps


def a_kernel(chip: str = "sm_80", **wanted) -> Specialised:
    """The large bf16 linear kernel with all in one loop."""
    launches = recorded(Case(structure=UNSTRUCTURED), chip, every_config=False)
    return specialise(chip, next(launch for launch in launches if launch.has("weight") and launch.has("S")), **wanted)


@pytest.mark.parametrize("chip", LISTS_OF)
def test_a_gpu_goes_by_the_lists_of_another(chip):
    for kernel in (configs.LINEAR, configs.SHRINK, configs.LORA_GRAD, configs.SDDMM_TILED, configs.SDDMM_BLOCKS):
        for size, bucket in itertools.product((2, 4), range(len(configs.TOKEN_BUCKETS))):
            own, other = (configs.configs(kernel, name, size, bucket) for name in (chip, LISTS_OF[chip]))
            assert [config.label for config in own] == [config.label for config in other]


def test_the_chips_are_the_architectures_with_their_limits():
    limits = {name: chip.shared_limit for name, chip in CHIPS.items()}
    assert limits | {"interpreter": 227 * 1024} == hardware.SHARED_MEMORY


def test_a_starved_kernel_fails():
    kernel = a_kernel(maxnreg=64)
    compiled = compile_for(kernel.chip, kernel.source, kernel.options)
    assert "local memory" in " ".join(faults(kernel, compiled))


@triton.jit
def widened_dot_kernel(out, x, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.load(x + at).to(tl.float32)
    tl.store(out + at, tl.dot(tile, tile, input_precision=PRECISION))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("chip", "precision"),
    [
        (chip, precision)
        for chip in CHIPS
        for precision in ("ieee", "tf32")
        if precision == "ieee" or CHIPS[chip].has_tf32
    ],
)
def test_a_dot_of_widened_operands_fails(chip, precision):
    tile = torch.empty(64, 64, dtype=BF16, device="meta")
    arguments = {"out": tile.float(), "x": tile, "BLOCK": 64, "PRECISION": precision}
    kernel = specialise(chip, Launch(widened_dot_kernel, arguments, {"num_warps": 4, "num_stages": 2}, BF16, "ieee"))
    found = " ".join(faults(kernel, compile_for(chip, kernel.source, kernel.options)))
    assert "multiplies f32, not bf16" in found
    assert ("no instruction of" in found) == (precision == "ieee" and not chip.startswith("gfx"))


def table(finished: list[tuple[Specialised, Compiled]]) -> str:
    """A GPU a line; then a variant a line, a GPU a column; of several configurations the first that was compiled.

    fp16 is as bf16.
    """
    chips = [chip for chip in CHIPS if any(kernel.chip == chip for kernel, _ in finished)]
    cells: dict[str, dict[str, str]] = {}
    for kernel, compiled in finished:
        if kernel.launch.operand == FP16 or not (kernel.launch.aligned or compiled.dots):
            continue
        shared = f"{compiled.shared / 1024:.0f}K"
        instructions = f"{compiled.instructions}, {compiled.tensor_core_instructions}"
        numbers = f"{compiled.registers} / {shared} / {instructions} / {compiled.local_bytes}"
        cells.setdefault(kernel.launch.variant, {}).setdefault(kernel.chip, f"{kernel.launch.tile}: {numbers}")
    lines = [
        "| GPU | kernels | with local memory | most bytes of it | largest shared memory | of KiB |",
        "|---" * 6 + "|",
    ]
    for chip in chips:
        own = [compiled for kernel, compiled in finished if kernel.chip == chip]
        local = [compiled.local_bytes for compiled in own if compiled.local_bytes]
        sizes = f"{max(compiled.shared for compiled in own) / KiB:.0f} | {CHIPS[chip].shared_limit // KiB}"
        lines.append(f"| {chip} | {len(own)} | {len(local)} | {max(local, default=0)} | {sizes} |")
    lines += [
        "",
        f"Triton {triton.__version__}. Tile, warps, stages: "
        "registers / shared / instructions, on tensor cores / bytes local",
        "",
        "| kernel | " + " | ".join(chips) + " |",
        "|---" * (1 + len(chips)) + "|",
    ]
    for variant, of_chip in cells.items():
        lines.append("| " + " | ".join((variant, *(of_chip.get(chip, "") for chip in chips))) + " |")
    return "\n".join(lines)
