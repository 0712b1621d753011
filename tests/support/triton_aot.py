"""Compiles recorded launches for GPUs that are not here, with the tools in Triton's wheel, and reads what came out.

All is read from the binary that Triton made, nothing compiled again: registers, stack and local memory by cuobjdump,
instructions by nvdisasm; on AMD both from the assembly, whose metadata the loader reads. (ptxas run again by hand,
without Triton's flags, spills where Triton's does not.)
"""

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from triton_launches import Launch

KiB = 1024


@dataclass(frozen=True)
class Chip:
    """shared_limit: bytes of shared memory that one program may have."""

    gpu: GPUTarget
    shared_limit: int

    @property
    def has_tf32(self) -> bool:
        return self.gpu.backend == "cuda" or self.gpu.arch == "gfx942"


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * KiB),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 * KiB),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 * KiB),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * KiB),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * KiB),
    "sm_103": Chip(GPUTarget("cuda", 103, 32), 227 * KiB),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * KiB),
    "gfx90a": Chip(GPUTarget("hip", "gfx90a", 64), 64 * KiB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * KiB),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 160 * KiB),
    "other": Chip(GPUTarget("hip", "gfx1100", 32), 64 * KiB),  # an RX 7900 XTX
}


def missing_tools() -> str | None:
    """Why nothing can be compiled here, if so."""
    tools = [triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell]
    tools += [triton.knobs.nvidia.cuobjdump, triton.knobs.nvidia.nvdisasm]
    try:
        for tool in tools:
            subprocess.run([tool.path, "--version"], check=True, capture_output=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"Triton's wheel lacks a tool: {error}"
    return None


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton's own launcher would specialise it for a chip: what it would compile."""

    chip: str
    launch: Launch
    source: ASTSource
    options: dict

    @functools.cached_property
    def key(self) -> tuple:
        return (self.chip, self.source.hash(), *sorted(self.options.items()))

    @property
    def title(self) -> str:
        return f"{self.chip} {self.launch.variant} {self.launch.tile}"


def specialise(chip: str, launch: Launch, **options) -> Specialised:
    """With more options than the launcher gives, if any."""
    backend = make_backend(CHIPS[chip].gpu)
    options = launch.options | options
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialisation, _ = bind(**launch.arguments)
    _, signature, constants, attributes = launch.kernel._pack_args(backend, dict(options), bound, specialisation, None)
    return Specialised(chip, launch, ASTSource(launch.kernel, signature, constants, attributes), options)


class Dot(NamedTuple):
    """(M, K) x (K, N) for operands of a dtype as MLIR writes it; unit: what multiplies, see UNITS."""

    M: int
    N: int
    K: int
    operand: str
    unit: str


UNITS = {
    "wgmma": ("HGMMA",),
    "tcgen05": ("UTCHMMA", "UTCMMA", "UTCQMMA"),
    "mma.sync": ("HMMA",),
    "mfma": ("v_mfma",),
    "wmma": ("v_wmma",),
    "fma": ("FFMA", "v_fma", "v_dual_fma", "v_pk_fma"),
}
"""Unit: how the instructions that drive it begin. fma is the one that is not a tensor core."""
_TENSOR_CORES = tuple(itertools.chain(*(prefixes for unit, prefixes in UNITS.items() if unit != "fma")))


@dataclass(frozen=True)
class Compiled:
    """registers: a thread's (AMD: VGPRs, AGPRs). shared: a program's bytes. local_bytes: a thread's stack and local.

    opcodes: how often each instruction stands in the code, modifiers included. buffers: for each operand that a loop
    fetches ahead, how many tiles of it shared memory holds.
    """

    registers: int
    shared: int
    local_bytes: int
    spills: int
    opcodes: Counter
    dots: tuple[Dot, ...]
    buffers: tuple[int, ...]

    def count(self, *prefixes: str, holding: str = "") -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes) and holding in opcode)

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def local_accesses(self) -> int:
        return self.count("STL", "LDL", "scratch_")

    @property
    def tensor_core_instructions(self) -> int:
        return self.count(*_TENSOR_CORES)

    @property
    def copies(self) -> int:
        """From memory straight into shared memory (cp.async)."""
        return self.count("LDGSTS")

    @property
    def wide_copies(self) -> int:
        """Those of 16 bytes a thread."""
        return self.count("LDGSTS", holding=".128")


def compile_for(chip: str, source: ASTSource, options: dict) -> Compiled:
    kernel = triton.compile(source, target=CHIPS[chip].gpu, options=options)
    read = _read_amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _read_cubin(kernel.asm["cubin"])
    ttgir = kernel.asm["ttgir"]
    return Compiled(shared=kernel.metadata.shared, dots=tuple(_dots(ttgir)), buffers=_buffers(ttgir), **read)


def _read_cubin(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output_of(triton.knobs.nvidia.nvdisasm.path, file.name)
    stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    registers = int(re.search(r"\bREG:(\d+)", usage)[1])
    return {"registers": registers, "local_bytes": stack + local, "spills": 0, "opcodes": opcodes}


def _read_amd(assembly: str) -> dict:
    def metadata(name: str) -> int:
        return int(re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)[1])

    return {
        "registers": metadata("vgpr_count"),
        "local_bytes": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count"),  # those of SGPRs go to lanes of VGPRs, not to memory
        "opcodes": Counter(re.findall(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)", assembly, re.MULTILINE)),
    }


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_LAYOUTS = {"amd_mfma": "mfma", "amd_wmma": "wmma", "nvidia_mma": "mma.sync"}
"""The unit that computes a dot whose result has the layout."""


def _dots(ttgir: str) -> Iterator[Dot]:
    """Dots of Triton's GPU dialect, whose operation and layout name the unit."""
    matrix = r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(\w+), "
    for operation, line in re.findall(r"(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) (.*)", ttgir):
        (M, K, operand), (_, N, _) = re.findall(matrix, line)[:2]
        if operation == "tt.dot":
            layout = re.search(r"parent = (#\w+)", line)[1]
            definition = re.search(rf"^{layout} = (.*)", ttgir, re.MULTILINE)[1]
            unit = next((unit for layout, unit in _LAYOUTS.items() if layout in definition), "fma")
        else:
            unit = "wgmma" if operation.endswith("group_dot") else "tcgen05"
        yield Dot(int(M), int(N), int(K), operand, unit)


def _buffers(ttgir: str) -> tuple[int, ...]:
    """Tiles in each buffer of floats that is allocated empty, which only the pipeliner does."""
    empty = r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32)"
    return tuple(map(int, re.findall(empty, ttgir)))
