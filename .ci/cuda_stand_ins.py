"""Makes empty stand-ins for the CUDA libraries that a CUDA build of PyTorch links, so that its CPU half loads without them.

    python .ci/cuda_stand_ins.py TORCH_LIB_DIRECTORY OUTPUT_DIRECTORY

The package index has PyTorch 2.10 for Linux with CUDA alone, whose libraries are gigabytes more. Every function of a
stand-in returns cudaErrorNoDevice, so that PyTorch sees a machine without GPUs.
"""

import collections
import re
import subprocess
import sys
from pathlib import Path

FUNCTION = '.globl "{0}"\n.type "{0}", @function\n"{0}": mov $100, %eax\nret\n'  # 100 is cudaErrorNoDevice
PYTHON_ITSELF = ("Py", "_Py")


def dynamic_symbols(library: Path) -> tuple[set[str], set[str], set[str]]:
    """The libraries that this one needs, the symbols that it defines, and those (name@version) that it must find."""
    text = subprocess.run(["readelf", "-W", "-d", "--dyn-syms", library], check=True, capture_output=True, text=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text.stdout))
    rows = re.findall(r"^ +\d+: \w+ +\d+ \w+ +(\w+) +\w+ +(\w+) (\S+)", text.stdout, re.MULTILINE)
    defined = {name.split("@")[0] for _, section, name in rows if section != "UND"}
    undefined = {name for binding, section, name in rows if section == "UND" and binding == "GLOBAL"}
    return needed, defined, undefined


def make_library(path: Path, functions: dict[str, set[str]]) -> None:
    """A library whose functions, by version, all do nothing."""
    assembly = path.with_suffix(".s")
    assembly.write_text("".join(FUNCTION.format(name) for name in sorted(set().union(*functions.values()))))
    script = path.with_suffix(".map")
    versions = [f"{version} {{ {' '.join(f'{n};' for n in names)} }};" for version, names in functions.items() if version]
    script.write_text("\n".join(versions))
    options = [f"-Wl,--version-script={script}"] if versions else []
    subprocess.run(["cc", "-shared", f"-Wl,-soname,{path.name}", *options, assembly, "-o", path], check=True)


def main() -> None:
    torch_lib, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    libraries = sorted(torch_lib.glob("*.so*"))
    parts = [dynamic_symbols(library) for library in libraries]
    needed, defined, undefined = (set().union(*part) for part in zip(*parts))
    system = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    missing = sorted(needed - {library.name for library in libraries} - set(re.findall(r"^\t(\S+) ", system, re.MULTILINE)))
    functions: dict[str, dict[str, set[str]]] = {name: collections.defaultdict(set) for name in missing}
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        owner = version if version in functions else "libnvshmem_host.so.3" if version == "NVSHMEM" else missing[0]
        if name not in defined and not name.startswith(PYTHON_ITSELF) and (not version or owner in (version, "libnvshmem_host.so.3")):
            functions[owner][version].add(name)
    for name in missing:
        make_library(output / name, functions[name])
    print(f"{len(missing)} stand-ins: {' '.join(missing)}")


main()
