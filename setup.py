"""Builds the native kernels where their compilers are; everything else about the package is in pyproject.toml.

ROSA_KERNELS_BUILD=auto (default): build what can be built, install without the rest and say why it is missing.
ROSA_KERNELS_BUILD=cpu: build the C++ kernels or fail.
ROSA_KERNELS_BUILD=cuda: build them and the CUDA kernels or fail.
ROSA_KERNELS_BUILD=none: do not build.
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX": compile the CUDA kernels for these, not for the GPUs that are here.
CXX="clang++": the C++ compiler, for the CUDA kernels too.
ROSA_KERNELS_SANITIZE=address,undefined (or one of these, or thread): compile the C++ kernels with these sanitizers.
"""

import itertools
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 10)
# The kernels call PyTorch's stable ABI as it was in this version. Every later PyTorch loads them.
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
COMMON_FLAGS = ["-std=c++17", "-O3", STABLE_ABI]

GPU_GEMMS = "csrc/gpu/library_gemm.cpp"
CPU_SOURCES = ["csrc/cpu/bindings.cpp", "csrc/cpu/cpu_features.cpp", GPU_GEMMS, "csrc/gpu/library_ops.cpp"]
CPU_KERNELS = "csrc/cpu/kernels.cpp"  # compiled once for each instruction set
# Python's flags may have -Wall, under which GCC 12 fills screens with false warnings about its own AVX-512 headers.
CPU_FLAGS = [*COMMON_FLAGS, "-g0", "-fvisibility=hidden", "-Wno-uninitialized"]
# They come last. Python's own flags have -fwrapv, under which no signed overflow would be reported.
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-wrapv", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}

CUDA_SOURCES = sorted(map(str, [*Path("csrc/cuda").glob("*.c*"), GPU_GEMMS]))
CUDA_FLAGS = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
# The static runtime does not bind the binary to one version of libcudart, so it outlives a change of PyTorch's CUDA.
# Both runtimes work in the driver's primary context, so the kernels run on PyTorch's current device.
CUDA_LINK_FLAGS = ["-shared", "--cudart=static"]
OLDEST_CUDA, OLDEST_ARCHITECTURE = (11, 8), (8, 0)
# For a machine that builds without a GPU. GPUs of 8.6 and 8.9 run the code for 8.0, those of 10.3 the code for 10.0.
# Other GPUs compile the PTX when they load it, which takes 16 s for all kernels, so 12.0 has code of its own.
DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0+PTX", "12.0"]

# The kernels do not use Python's C API, so one binary serves every Python. A free-threaded Python before 3.15 takes no
# abi3 wheel and gets one of its own.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")


class Unavailable(Exception):
    """Says why kernels cannot be built here."""


def requested_build() -> str:
    value = os.environ.get("ROSA_KERNELS_BUILD", "auto")
    if value not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"ROSA_KERNELS_BUILD: expected auto, cpu, cuda or none, got {value!r}")
    return value


def sanitizer_flags() -> list[str]:
    value = os.environ.get("ROSA_KERNELS_SANITIZE", "")
    if not value:
        return []
    if value != "thread" and not {"address", "undefined"}.issuperset(value.split(",")):
        sys.exit(f"ROSA_KERNELS_SANITIZE: expected address, undefined, both with a comma, or thread, got {value!r}")
    return [*SANITIZE_FLAGS, f"-fsanitize={value}"]


def torch_directory() -> Path | None:
    """Finds the torch to build against: the build environment's, else that of the environment pip installs into."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    places.append(site.getusersitepackages())
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and re.search(r"system-site-packages\s*=\s*true", config.read_text()):
        places.append(sysconfig.get_path("purelib", vars={"base": sys.base_prefix}))
    for place in dict.fromkeys(places):
        version_file = Path(place) / "torch" / "version.py"
        if version_file.exists():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
            if version and (int(version[1]), int(version[2])) >= OLDEST_TORCH:
                return version_file.parent
    return None


def cuda_version(torch: Path) -> str | None:
    """Reads the version of CUDA that torch is built for, if any."""
    version = re.search(r"^cuda\b.*'([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return version[1] if version else None


def run_compiler(command: list[str]) -> str:
    """Returns what the command printed. Where it fails, the reason ends with the last lines that it printed."""
    if shutil.which(command[0]) is None:
        raise Unavailable(
            f"the compiler {command[0]} is not found; install it, or set CXX to another, and install again"
        )
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
        last_lines = done.stdout.strip().splitlines()[-10:] or ["(it printed nothing)"]
        raise Unavailable("\n".join([f"{command[0]} failed with exit status {done.returncode}:", *last_lines]))
    return done.stdout


def nvcc_command(cuda: str | None) -> list[str]:
    """Finds an nvcc for a torch of that CUDA, has it compile and link an empty file, and adds its architectures."""
    if cuda is None:
        raise Unavailable("torch is built without CUDA; install a CUDA build of torch")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise Unavailable(f"no nvcc is found ({', '.join(places)}); install the CUDA {cuda} toolkit and install again")
    release = re.search(r"release (\d+)\.(\d+)", run_compiler([nvcc, "--version"]))
    if release is None:
        raise Unavailable(f"{nvcc} --version names no release of CUDA")
    major, minor = map(int, release.groups())
    if (major, minor) < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        raise Unavailable(f"{nvcc} is of CUDA {major}.{minor}, the kernels need {oldest} or newer")
    if major != int(cuda.split(".")[0]):
        raise Unavailable(f"{nvcc} is of CUDA {major}.{minor}, torch of CUDA {cuda}: their major versions must match")
    host = shutil.which(os.environ.get("CXX", ""))
    command = [nvcc, *architecture_options(nvcc), *(["-ccbin", host] if host else [])]
    with tempfile.TemporaryDirectory() as directory:
        run_compiler([*command, *CUDA_LINK_FLAGS, "-x", "cu", os.devnull, "-o", f"{directory}/probe.so"])
    return command


def architecture_options(nvcc: str) -> list[str]:
    """Names the architectures of TORCH_CUDA_ARCH_LIST to nvcc, else those of the GPUs here, else the default ones."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        known = {f"{n[:-1]}.{n[-1]}" for n in re.findall(r"\bsm_(\d+)", run_compiler([nvcc, "--list-gpu-code"]))}
        default = [name for name in DEFAULT_ARCHITECTURES if name.removesuffix("+PTX") in known]
        wanted = [n for n in local_gpus() if n in known] or default
        if not wanted:
            raise Unavailable(f"{nvcc} knows none of {', '.join([*local_gpus(), *DEFAULT_ARCHITECTURES])}")
        if not any(name.endswith("+PTX") for name in wanted):
            wanted[-1] += "+PTX"  # later GPUs compile this for themselves
    options = []
    for name in wanted:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not parts:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST: expected numbers as in 8.0;9.0+PTX, got {name}")
        major, minor, features, ptx = parts.groups()
        if (int(major), int(minor)) >= OLDEST_ARCHITECTURE:
            number = major + minor + features
            codes = [f"sm_{number}", f"compute_{number}"] if ptx else [f"sm_{number}"]
            options += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    if not options:
        raise Unavailable(f"the kernels need GPUs of compute capability 8.0 or newer, not {' '.join(wanted)}")
    return options


def local_gpus() -> list[str]:
    """Asks nvidia-smi, as pip's build environment may have no torch, for compute capabilities from 8.0, ascending."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, check=False, capture_output=True, text=True).stdout
    seen = {tuple(map(int, numbers)) for numbers in re.findall(r"^(\d+)\.(\d+)$", answer, re.MULTILINE)}
    return [f"{major}.{minor}" for major, minor in sorted(seen) if (major, minor) >= OLDEST_ARCHITECTURE]


class BuildKernels(build_ext):
    """Compiles each file with its own flags, all files side by side, and leaves out a library that fails under "auto".

    Beside a library that is left out, NAME.build_error.txt holds the reason, which the package repeats.
    """

    def build_extensions(self) -> None:
        for earlier in Path(self.build_lib, "rosa_kernels").glob("_*.*"):
            if earlier.suffix in (".so", ".txt"):
                earlier.unlink()  # so that neither a failed nor a narrower build ships it
        started: list[tuple[Extension, list[str], list[Future]]] = []
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            for extension in list(self.extensions):
                try:
                    of_cuda = extension.name == "rosa_kernels._cuda"
                    linker, commands = (self.cuda_commands if of_cuda else self.cpu_commands)(extension)
                    started.append((extension, linker, [pool.submit(self.compile, *command) for command in commands]))
                except Unavailable as reason:
                    self.leave_out(extension, reason)
            for extension, linker, jobs in started:
                try:
                    self.link(extension, linker, [job.result() for job in jobs])
                except Unavailable as reason:
                    for job in jobs:
                        job.cancel()
                    self.leave_out(extension, reason)
        finally:
            pool.shutdown(cancel_futures=True)

    def cpu_commands(self, extension: Extension) -> tuple[list[str], list[tuple[list[str], Path]]]:
        """Returns the command that links and, for each object file, the command that compiles it and its path."""
        if platform.system() not in ("Linux", "Darwin"):
            raise Unavailable(f"the kernels build on Linux and macOS, not on {platform.system()}")
        # A Python for one architecture of macOS takes another one from ARCHFLAGS, as setuptools' own commands do.
        architecture = os.environ.get("ARCHFLAGS", "").split() if platform.system() == "Darwin" else []
        compiler = [*self.compiler.compiler_so_cxx, *architecture, *CPU_FLAGS, *sanitizer_flags()]
        compiler += [f"-I{path}" for path in extension.include_dirs]
        run_compiler([*compiler, "-x", "c++", "-fsyntax-only", os.devnull])
        commands = [([*compiler, "-c", source], Path(self.build_temp, f"{source}.o")) for source in CPU_SOURCES]
        for name, flags in INSTRUCTION_SETS.items():
            defines = [f"-DROSA_ISA={name}", *(flags if self.compiles_for(flags) else ["-DROSA_ISA_UNKNOWN=1"])]
            commands.append(
                ([*compiler, *defines, "-c", CPU_KERNELS], Path(self.build_temp, f"{CPU_KERNELS}.{name}.o"))
            )
        # Python's own command for linking may name another compiler, whose options alone are of use.
        link_options = itertools.dropwhile(lambda word: not word.startswith("-"), self.compiler.linker_so_cxx)
        return [*self.compiler.compiler_so_cxx, *architecture, *link_options, *sanitizer_flags()], commands

    def cuda_commands(self, extension: Extension) -> tuple[list[str], list[tuple[list[str], Path]]]:
        """Returns the same for nvcc, which hands .cpp files on to the C++ compiler, with CUDA's headers."""
        nvcc = nvcc_command(extension.cuda_version)
        compiler = [*nvcc, *CUDA_FLAGS, *(f"-I{path}" for path in extension.include_dirs)]
        commands = [([*compiler, "-c", source], Path(self.build_temp, f"{source}.o")) for source in CUDA_SOURCES]
        return [*nvcc, *CUDA_LINK_FLAGS], commands

    def compiles_for(self, flags: list[str]) -> bool:
        """Whether the compiler compiles for this machine with the flags of an instruction set."""
        if flags and platform.machine() not in ("x86_64", "AMD64"):
            return False
        probe = [*self.compiler.compiler_so_cxx, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        known = subprocess.run(probe, check=False, capture_output=True).returncode == 0
        if not known:
            print(f"rosa_kernels: no kernels for {' '.join(flags)}, which the compiler does not know", file=sys.stderr)
        return known

    def compile(self, command: list[str], target: Path) -> str:
        target.parent.mkdir(parents=True, exist_ok=True)
        sys.stderr.write(run_compiler([*command, "-o", str(target)]))  # warnings, if any
        return str(target)

    def link(self, extension: Extension, linker: list[str], objects: list[str]) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        directories = [f"-L{directory}" for directory in extension.library_dirs]
        libraries = [f"-l{name}" for name in extension.libraries]
        # A linker that dies leaves half a file, which must not lie where a wheel takes it from.
        unfinished = Path(self.build_temp, library.name)
        run_compiler([*linker, *objects, *directories, *libraries, "-o", str(unfinished)])
        shutil.move(unfinished, library)

    def leave_out(self, extension: Extension, reason: Unavailable) -> None:
        if requested_build() != "auto":
            sys.exit(f"ROSA_KERNELS_BUILD={requested_build()}: {reason}")
        print(f"rosa_kernels: {extension.name} is not built: {reason}", file=sys.stderr)
        self.extensions.remove(extension)
        report = Path(self.build_lib, *extension.name.split(".")).with_suffix(".build_error.txt")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(f"{reason}\n")

    def copy_extensions_to_source(self) -> None:
        """Copies the libraries or the reasons for their absence beside the sources, over an earlier build's."""
        for path in (Path("rosa_kernels", name) for name in ("_C", "_cuda")):
            for earlier in path.parent.glob(f"{path.name}.*"):
                earlier.unlink()
            report = Path(self.build_lib, path).with_suffix(".build_error.txt")
            if report.exists():
                self.copy_file(str(report), str(path.parent))
        super().copy_extensions_to_source()


class BuildWheel(bdist_wheel):
    """Names the wheel by what was built: bdist_wheel decides before the compilers run, when all may yet fail."""

    @property
    def root_is_pure(self) -> bool:
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, decided_before_building: bool | None) -> None:
        pass


def extensions(torch: Path) -> list[Extension]:
    options = {"include_dirs": [str(torch / "include"), "csrc"], "library_dirs": [str(torch / "lib")]}
    options["py_limited_api"] = ABI3
    cpu = Extension("rosa_kernels._C", [*CPU_SOURCES, CPU_KERNELS], libraries=["torch_cpu"], **options)
    cuda = Extension("rosa_kernels._cuda", CUDA_SOURCES, libraries=["torch_cpu", "torch_cuda", "dl"], **options)
    cuda.cuda_version = cuda_version(torch)
    wants_cuda = requested_build() == "cuda" or requested_build() == "auto" and cuda.cuda_version is not None
    return [cpu, cuda] if wants_cuda else [cpu]


options = {"cmdclass": {"bdist_wheel": BuildWheel, "build_ext": BuildKernels}}
if ABI3:
    options["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
if requested_build() != "none":
    torch = torch_directory()
    if torch is not None:
        options["ext_modules"] = extensions(torch)
    else:  # setuptools.build_meta hands this to pip, which installs it and runs setup.py again
        options["setup_requires"] = [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]
setup(**options)
