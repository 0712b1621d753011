"""Every CUDA kernel compiled for GPUs that are not here: no spills, no local memory, tensor cores, 16-byte accesses.

The default tier compiles one source file, `--exhaustive` compiles all of them.
`--cuda-compile-table bench/results/cuda-compile-table.md` writes the table that is printed at the end.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cuda_compile
from cuda_compile import CHIPS, CSRC, FLAGS, SOURCES, Kernel, compiled, nvcc, nvdisasm, output_of
from tiers import is_exhaustive

if reason := cuda_compile.missing_tools():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.cases_by_tier

DTYPES = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}
KERNELS = sorted(
    name
    for source in (*SOURCES, *(CSRC / "cuda").glob("*.h"))
    for name in re.findall(r"__global__[^{;]*?(\w+_kernel)\(", source.read_text(encoding="utf-8"))
)
SOURCE_OF_DEFAULT_TIER, KERNELS_OF_DEFAULT_TIER = CSRC / "cuda" / "lora_grad.cu", ["lora_grad_kernel"]
CHIPS_OF_DEFAULT_TIER = ("sm_80", "sm_90", "sm_100")
REGISTERS = 65536
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_103": 228, "sm_120": 100}
"""KiB. Both are of a multiprocessor; a block takes 1 KiB of shared memory more than it asks for."""

MMAS = {"shrink_kernel": 2, "lora_grad_kernel": 8, "epilogue_kernel": 4}
"""In the loop's body, for each tile of ranks and each of the numbers that stand for one of the adapter's."""
TERMS = {("__nv_bfloat16",) * 2: 1, ("__half",) * 2: 1, ("__nv_bfloat16", "float"): 3}
"""16-bit numbers that stand for one of the adapter's, by the dtypes of x and the adapter that meet on tensor cores."""
WIDE_LOADS = {
    "transpose_kernel": 2,
    "shrink_kernel": 4,
    "lora_grad_kernel": 4,
    "epilogue_kernel": 2,
    "sddmm_kernel": 16,
    "densify_kernel": 4,
}
WIDE_STORES = {"transpose_kernel": 2, "epilogue_kernel": 2, "densify_kernel": 4}
"""Of 16 bytes a thread: at least so many, from and to global memory."""

needs_nvdisasm = pytest.mark.skipif(
    nvdisasm() is None, reason="no code is read: nvdisasm is neither in the CUDA toolkit nor in a wheel of Triton"
)


class Compiler:
    """Compiles on all processors, ahead of the tests that ask; its results are the table."""

    def __init__(self, sources: tuple[Path, ...], chips: list[str], directory: Path):
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        # the newest GPU's take longest
        self._jobs = {chip: [self._start(source, chip, directory) for source in sources] for chip in reversed(chips)}

    def _start(self, source: Path, chip: str, directory: Path):
        own = directory / chip / source.stem
        own.mkdir(parents=True)
        return self._pool.submit(compiled, source, chip, own)

    def __call__(self, chip: str) -> list[Kernel]:
        return list({kernel.title: kernel for job in self._jobs[chip] for kernel in job.result()}.values())

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pytest_terminal_summary(self, terminalreporter, config):
        if any(job.cancelled() or job.exception() for jobs in self._jobs.values() for job in jobs):
            return
        text = table({chip: self(chip) for chip in reversed(self._jobs)})
        terminalreporter.section("compiled CUDA kernels")
        terminalreporter.write_line(text)
        if file := config.getoption("--cuda-compile-table"):
            Path(file).write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def compiler(request, tmp_path_factory):
    """For the GPUs of the tests selected."""
    own = [item for item in request.session.items if item.path == request.path and "kernels" in item.fixturenames]
    wanted = {item.callspec.params["chip"] for item in own}
    sources = SOURCES if is_exhaustive(request.config) else (SOURCE_OF_DEFAULT_TIER,)
    compiler = Compiler(sources, [chip for chip in CHIPS if chip in wanted], tmp_path_factory.mktemp("cuda"))
    request.config.pluginmanager.register(compiler)
    yield compiler
    compiler.close()


@pytest.fixture
def kernels(compiler, chip, name, dtype) -> list[Kernel]:
    """All instantiations of a kernel for a dtype, its first argument; or the kernel itself, if it has no arguments."""
    found = [
        kernel for kernel in compiler(chip) if kernel.name == name and kernel.arguments[:1] in ((), (DTYPES[dtype],))
    ]
    assert found, f"{name} is not compiled for {dtype}"
    return found


def pytest_generate_tests(metafunc):
    if "kernels" in metafunc.fixturenames:
        every = is_exhaustive(metafunc.config)
        metafunc.parametrize("name", KERNELS if every else KERNELS_OF_DEFAULT_TIER)
        metafunc.parametrize("dtype", DTYPES)
        metafunc.parametrize("chip", CHIPS if every else CHIPS_OF_DEFAULT_TIER)


def misfits(kernel: Kernel, chip: str) -> list[str]:
    """What a kernel needs and a multiprocessor has not."""
    found = []
    if kernel.stack or kernel.spills:
        found.append(f"{kernel.stack} bytes of stack, {kernel.spills} spilt")
    registers = kernel.blocks * kernel.threads * (-(-kernel.registers // 8) * 8)
    if registers > REGISTERS:
        found.append(f"{kernel.blocks} blocks of {kernel.threads} threads take {registers} registers, of {REGISTERS}")
    shared = kernel.blocks * (kernel.shared + 1024)
    if shared > SHARED[chip] * 1024:
        found.append(f"{kernel.blocks} blocks take {shared} bytes of shared memory, of {SHARED[chip] * 1024}")
    return found


def mmas_of(kernel: Kernel) -> int:
    """Of the loop's body: what the compiler unrolls is a multiple of it."""
    if kernel.name not in MMAS:
        return 0
    rank_tiles = 1 if kernel.name == "epilogue_kernel" else int(kernel.arguments[2])
    return MMAS[kernel.name] * rank_tiles * TERMS.get(tuple(kernel.arguments[:2]), 0)


def code_faults(kernel: Kernel) -> list[str]:
    """Instructions that a kernel should not have, and those that it should have and has not."""
    found = []
    if local := kernel.count("LDL", "STL"):
        found.append(f"{local} accesses of local memory")
    expected, on_tensor_cores = mmas_of(kernel), kernel.tensor_core_instructions
    if on_tensor_cores % expected if expected and on_tensor_cores else on_tensor_cores != expected:
        found.append(f"{on_tensor_cores} tensor-core instructions, not {expected} or a multiple of it")
    in_bf16 = kernel.count("HMMA", holding=".BF16")
    if in_bf16 != (on_tensor_cores if "__nv_bfloat16" in kernel.arguments[:1] else 0):
        found.append(f"{in_bf16} of {on_tensor_cores} tensor-core instructions multiply bf16")
    for opcode, fewest in (("LDG", WIDE_LOADS), ("STG", WIDE_STORES)):
        wide = kernel.count(opcode, holding=".128")
        if wide < fewest.get(kernel.name, 0):
            found.append(f"only {wide} {opcode} take 16 bytes")
    return found


def test_it_fits(kernels, chip):
    assert not [f"{kernel.title}: {fault}" for kernel in kernels for fault in misfits(kernel, chip)]


@needs_nvdisasm
def test_its_code_is_fast(kernels):
    assert not [f"{kernel.title}: {fault}" for kernel in kernels for fault in code_faults(kernel)]


def test_the_launchers_compile(tmp_path):
    include = Path(torch.__file__).parent / "include"
    definitions = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    source = CSRC / "cuda" / "bindings.cpp"
    output_of(
        nvcc(),
        *FLAGS,
        "-Xcompiler=-Wall,-Werror,-fvisibility=hidden",
        *definitions,
        "-isystem",
        include,
        "-c",
        source,
        "-o",
        tmp_path / "ops.o",
    )


FAULTY = """
namespace rosa {

// no mma, loads of 2 bytes, a local array behind an index that is not known
template <typename T, typename A_t, int RANK_TILES>
__global__ void shrink_kernel(T* out, const A_t* in, int n) {
  T numbers[64];
  for (int i = 0; i < n; ++i) numbers[in[i] > in[0] ? i : 0] = out[i];
  for (int i = 0; i < n; ++i) out[i] = numbers[n - i];
}

// half of the products, and those of another dtype; six blocks of 41 KiB
template <typename T, typename H_t, int RANK_TILES>
__global__ void __launch_bounds__(32, 6) lora_grad_kernel(float* out, const uint4* in, int from) {
  __shared__ float numbers[41 * 256];
  const uint4 a = in[threadIdx.x];
  const uint2 b = reinterpret_cast<const uint2*>(in)[threadIdx.x];
  const uint32_t a_fragment[4] = {a.x, a.y, a.z, a.w}, b_fragment[2] = {b.x, b.y};
  float acc[4] = {};
#pragma unroll
  for (int i = 0; i < 4 * RANK_TILES; ++i) mma<__nv_bfloat16>(acc, a_fragment, b_fragment);
  numbers[threadIdx.x] = acc[0] + acc[1] + acc[2] + acc[3];
  __syncthreads();
  out[threadIdx.x] = numbers[from];
}

// more than 64 registers, and no bound of 1024 threads
template <typename T>
__global__ void gather_entries_kernel(T* out, const T* in, int n) {
  T numbers[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) numbers[i] = in[i * n];
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * n] = numbers[i] * numbers[(i + 48) % 96];
}

template __global__ void shrink_kernel<__half, __half, 2>(__half*, const __half*, int);
template __global__ void lora_grad_kernel<__half, __half, 1>(float*, const uint4*, int);
template __global__ void gather_entries_kernel<float>(float*, const float*, int);

}  // namespace rosa
"""


@needs_nvdisasm
def test_faults_are_found(tmp_path):
    source = tmp_path / "faulty.cu"
    source.write_text(f'#include "{CSRC}/cuda/device_functions.h"\n{FAULTY}', encoding="utf-8")
    kernels = compiled(source, "sm_90", tmp_path)
    found = {kernel.name: "; ".join(misfits(kernel, "sm_90") + code_faults(kernel)) for kernel in kernels}
    assert re.fullmatch(
        r"[1-9]\d* bytes of stack, 0 spilt; [1-9]\d* accesses of local memory; "
        r"0 tensor-core instructions, not 4 or a multiple of it; only 0 LDG take 16 bytes",
        found["shrink_kernel"],
    )
    assert found["lora_grad_kernel"] == (
        "6 blocks take 258048 bytes of shared memory, of 233472; "
        "4 tensor-core instructions, not 8 or a multiple of it; "
        "4 of 4 tensor-core instructions multiply bf16; only 1 LDG take 16 bytes"
    )
    assert re.fullmatch(r"1 blocks of 1024 threads take \d+ registers, of 65536", found["gather_entries_kernel"])


def table(kernels_of: dict[str, list[Kernel]]) -> str:
    """A GPU a line; then a kernel a line, a GPU a column."""
    release = re.search(r"release (\S+),", output_of(nvcc(), "--version"))[1]
    lines = ["| GPU | kernels | with local memory | largest static shared memory, KiB |", "|---" * 4 + "|"]
    for chip, kernels in kernels_of.items():
        spilt = sum(kernel.stack > 0 or kernel.spills > 0 for kernel in kernels)
        lines.append(f"| {chip} | {len(kernels)} | {spilt} | {max(kernel.shared for kernel in kernels) / 1024:.0f} |")
    lines += [
        "",
        f"nvcc {release}. Registers / static shared / instructions, on tensor cores. "
        "fp16 is as bf16, or as fp32 beside it.",
        "",
        "| kernel | " + " | ".join(kernels_of) + " |",
        "|---" * (1 + len(kernels_of)) + "|",
    ]
    cells: dict[str, dict[str, str]] = {}
    for chip, kernels in kernels_of.items():
        for kernel in kernels:
            if "__half" not in kernel.arguments:
                code = (
                    "" if kernel.opcodes is None else f" / {kernel.opcodes.total()}, {kernel.tensor_core_instructions}"
                )
                cell = f"{kernel.registers} / {kernel.shared / 1024:.0f}K{code}"
                cells.setdefault(kernel.title, {})[chip] = cell
    for title in sorted(cells):
        lines.append("| " + " | ".join((title, *(cells[title].get(chip, "") for chip in kernels_of))) + " |")
    return "\n".join(lines)
