"""Makes empty stand-ins for the CUDA libraries that a CUDA build of PyTorch links. It runs on a CPU without them.

    python .ci/cuda_stand_ins.py TORCH_LIB_DIRECTORY OUTPUT_DIRECTORY

The package index has PyTorch 2.10 for Linux with CUDA alone, and its CUDA libraries are gigabytes more. Every function
of a stand-in returns cudaErrorNoDevice, so PyTorch sees a machine without GPUs.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice
FUNCTION = f'.globl "{{0}}"\n.type "{{0}}", @function\n"{{0}}":\n  mov ${NO_DEVICE}, %eax\n  ret\n'
LIBRARIES_OF_VERSIONS = {"NVSHMEM": "libnvshmem_host.so.3"}  # the others name their symbols' version as themselves
PROVIDED_BY_PYTHON = ("Py", "_Py")


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dynamic_symbols(library: Path) -> tuple[set[str], set[str], set[str]]:
    """Lists the libraries that this one needs, the symbols it defines, and those (name@version) that it must find."""
    text = output_of("readelf", "-W", "-d", "--dyn-syms", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
    symbols = re.findall(r"^ +\d+: \w+ +\d+ \w+ +(\w+) +\w+ +(\w+) (\S+)", text, re.MULTILINE)
    defined = {name.partition("@")[0] for _, section, name in symbols if section != "UND"}
    undefined = {name for binding, section, name in symbols if section == "UND" and binding == "GLOBAL"}
    return needed, defined, undefined


def make_library(path: Path, functions: dict[str, set[str]]) -> None:
    """Assembles a library of functions, grouped by symbol version, "" for none."""
    assembly, script = path.with_suffix(".s"), path.with_suffix(".map")
    assembly.write_text("".join(FUNCTION.format(name) for name in sorted(set().union(*functions.values()))))
    versions = {version: names for version, names in functions.items() if version}
    script.write_text("".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in versions.items()))
    options = ["-shared", "-Wl,-z,noexecstack", f"-Wl,-soname,{path.name}"]
    if versions:
        options.append(f"-Wl,--version-script={script}")
    output_of("cc", *options, assembly, "-o", path)


def main() -> None:
    torch_lib, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    present = sorted(torch_lib.glob("*.so*"))
    needed, defined, undefined = (set().union(*sets) for sets in zip(*map(dynamic_symbols, present)))
    on_the_system = set(re.findall(r"^\t(\S+) ", output_of("ldconfig", "-p"), re.MULTILINE))
    missing = sorted(needed - {library.name for library in present} - on_the_system)
    functions: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        # A symbol without a version is looked for in every library, so any of them may define it.
        owner = LIBRARIES_OF_VERSIONS.get(version, version) if version else missing[0]
        if owner in functions and name not in defined and not name.startswith(PROVIDED_BY_PYTHON):
            functions[owner][version].add(name)
    for name in missing:
        make_library(output / name, functions[name])
    print(f"{len(missing)} stand-ins: {' '.join(missing)}")


main()
