"""Compiles CUDA sources for GPUs that are not here, and reads what nvcc, ptxas and nvdisasm say of each kernel."""

import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from paths import CSRC

SOURCES = tuple(sorted((CSRC / "cuda").glob("*.cu"), key=lambda source: -source.stat().st_size))
"""The largest first."""
CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
FLAGS = ("-std=c++17", "-O3", "-Werror=all-warnings", f"-I{CSRC}")  # those of setup.py, and no warnings


@functools.cache
def nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


@functools.cache
def nvdisasm() -> str | None:
    """The toolkit's, or that of Triton's wheel."""
    if found := shutil.which("nvdisasm") or shutil.which(Path(nvcc()).parent / "nvdisasm"):
        return found
    try:
        import triton

        return triton.knobs.nvidia.nvdisasm.path
    except (ModuleNotFoundError, RuntimeError):  # no Triton, or none for NVIDIA
        return None


def missing_tools() -> str | None:
    """Why nothing can be compiled here, if so."""
    if nvcc() is None:
        return "nvcc is not found (CUDA_HOME, PATH, /usr/local/cuda): the CUDA kernels are not compiled"
    if shutil.which("c++filt") is None:
        return "c++filt is not found: the names of the compiled kernels cannot be read"
    unknown = set(CHIPS) - set(output_of(nvcc(), "--list-gpu-code").split())
    return f"{nvcc()} does not know {', '.join(sorted(unknown))}" if unknown else None


def output_of(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Kernel:
    """An instantiation of a kernel, and what nvcc made of it.

    arguments are its template's, if it is one, as C++ writes them. shared, stack and spills count bytes. A block has at
    most `threads`, and a multiprocessor is to hold `blocks`. opcodes counts each instruction of the code, modifiers
    included; it is None without nvdisasm.
    """

    name: str
    arguments: tuple[str, ...]
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int
    blocks: int
    opcodes: Counter | None

    @property
    def title(self) -> str:
        text = f"{self.name}<{', '.join(self.arguments)}>" if self.arguments else self.name
        for long, short in (
            ("__nv_bfloat16", "bf16"),
            ("__half", "fp16"),
            ("float", "fp32"),
            ("(rosa::Gather)", "Gather "),
        ):
            text = text.replace(long, short)
        return text

    def count(self, *prefixes: str, holding: str = "") -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes) and holding in opcode)

    @property
    def tensor_core_instructions(self) -> int:
        return self.count("HMMA.16816.F32")


def compiled(source: Path, chip: str, directory: Path) -> list[Kernel]:
    """All kernels of a file. nvcc leaves what it makes on the way in the directory."""
    cubin, ptx = directory / "kernels.cubin", directory / f"{source.stem}.ptx"
    keep = ("--keep", "--keep-dir", directory)
    log = output_of(nvcc(), *FLAGS, f"-arch={chip}", "-cubin", "-Xptxas=-v", *keep, source, "-o", cubin)
    launches = _launch_bounds(ptx.read_text())
    code = _opcodes(output_of(nvdisasm(), "-c", cubin)) if nvdisasm() else {}
    usage = dict(re.findall(r"Compiling entry function '(\w+)'(.*?Used.*?)\n", log, re.DOTALL))
    symbols = output_of("c++filt", text="\n".join(usage)).splitlines()
    kernels = []
    for (symbol, used), demangled in zip(usage.items(), symbols, strict=True):
        name, arguments = re.match(r"(?:void )?rosa::(\w+)(?:<(.*?)>)?\(", demangled).groups()
        threads, blocks = launches[symbol]
        kernel = Kernel(
            name,
            tuple(arguments.split(", ")) if arguments else (),
            registers=_number(r"Used (\d+) registers", used),
            shared=_number(r"(\d+) bytes smem", used),
            stack=_number(r"(\d+) bytes stack", used),
            spills=_number(r"(\d+) bytes spill stores", used),
            threads=threads,
            blocks=blocks,
            opcodes=code.get(symbol),
        )
        kernels.append(kernel)
    return kernels


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Threads (1024 where a kernel sets no bound) and blocks by symbol."""
    bounds = {}
    for symbol, head in re.findall(r"\.entry (\w+)\((.*?)\n\{", ptx, re.DOTALL):
        bounds[symbol] = _number(r"\.maxntid (\d+)", head) or 1024, _number(r"\.minnctapersm (\d+)", head) or 1
    return bounds


def _opcodes(sass: str) -> dict[str, Counter]:
    """By symbol."""
    sections = re.split(r"^\.text\.(\w+):$", sass, flags=re.MULTILINE)
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {symbol: Counter(instruction.findall(code)) for symbol, code in zip(sections[1::2], sections[2::2])}
