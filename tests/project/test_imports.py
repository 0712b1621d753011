"""The package's files import downwards: from their own room or a lower one, and never in a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROOMS = [
    ["transforms", "pattern", "dropout", "config", "version", "jagged", "checks"],
    ["backends"],
    ["backends.cpu", "backends.gpu"],
    ["backends.triton", "backends.cuda"],
    ["dispatch"],
    ["op_checks", "direct_call", "ops", "flop_counts"],
    ["autograd"],
    ["functional"],
    ["nn"],
    ["adapters"],
    ["graphs"],
    ["__init__", "__main__", "tune"],
]
"""Lowest first: files, and folders with all in them that has no room of its own."""

CPU_KERNELS = ["isa", "common", "dense", "sparse", "adapter", "cpu"]
"""The folders of csrc/cpu, lowest first; "cpu" stands for csrc/cpu itself."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""{(importing file, imported file): the reason}; at most five."""


def files_of(package: Path) -> dict[str, Path]:
    """{dotted name below the package: file}; a folder's __init__.py has the folder's name, the package's its own."""
    names = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return names


def imports_of(tree: ast.Module, name: str, files: dict[str, Path], package: str) -> set[str]:
    """The package's files that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno}: expected an absolute import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [dotted for dotted in inside if dotted.removeprefix(f"{package}.") in files]
            wanted = modules if len(modules) == len(inside) else [*modules, node.module]
        else:
            continue
        for dotted in wanted:
            if dotted == package:
                found.add("__init__")
            elif dotted.startswith(f"{package}."):
                found.add(dotted.removeprefix(f"{package}."))
    return found


def import_graph(package: Path) -> dict[str, set[str]]:
    """{file: the files that it imports}."""
    files = files_of(package)
    return {
        name: imports_of(ast.parse(file.read_text(encoding="utf-8")), name, files, package.name)
        for name, file in files.items()
    }


def room_of(name: str) -> int:
    """The number of a file's room: that of the longest member of ROOMS that is the file or a folder around it."""
    around = {m: number for number, room in enumerate(ROOMS) for m in room if f"{name}.".startswith(f"{m}.")}
    assert around, f"{name}: is in no room; add it to ROOMS and to docs/architecture.md"
    return around[max(around, key=len)]


def upward_imports(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {(name, other) for name, others in graph.items() for other in others if room_of(other) > room_of(name)}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The files of one circle in order, the first once more at the end; empty where there is none."""
    finished: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(graph[name]):
            if circle := search(other, [*path, name]):
                return circle
        finished.add(name)
        return []

    return next(filter(None, (search(name, []) for name in graph)), [])


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT / "rosa_kernels")


def test_every_import_is_seen(graph):
    assert {"dispatch", "pattern"} <= graph["functional"] and len(graph) > 40
    assert "nn" in graph["__init__"] and "__init__" in graph["__main__"]
    assert {other for others in graph.values() for other in others} <= graph.keys()


def test_no_file_imports_from_a_higher_room(graph):
    assert upward_imports(graph) == set(EXCEPTIONS) and len(EXCEPTIONS) <= 5


def test_no_files_import_one_another_in_a_circle(graph):
    assert circle_in(graph) == []


def test_no_kernel_of_the_cpu_includes_from_a_higher_folder():
    csrc, includes = ROOT / "csrc", 0
    for file in sorted((csrc / "cpu").rglob("*.[hc]*")):
        for name in re.findall(r'^#include "(cpu/.+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            higher, lower = (CPU_KERNELS.index(path.parent.name) for path in (file, csrc / name))
            assert lower <= higher, f"{file.relative_to(csrc)} includes {name}"
            includes += 1
    assert includes > 30


def test_the_architecture_page_lists_the_rooms_in_this_order():
    """A row a room, whose first cell lists the room's files; it may list more of them than ROOMS, which has folders."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| (.+?) \|", page, re.MULTILINE)
    listed = [[name.replace("/", ".") for name in re.findall(r"`([\w/]+)`", row)] for row in rows]
    assert [[name for name in names if name in room] for names, room in zip(listed, ROOMS)] == ROOMS
    assert len(listed) == len(ROOMS) and all(room_of(name) == n for n, names in enumerate(listed) for name in names)


@pytest.mark.parametrize(
    "line",
    [
        "import pkg.functional",
        "from pkg import functional",
        "from pkg.functional import spmm",
        "import pkg.functional as f",
    ],
)
def test_a_planted_circle_is_found_inside_a_function_too(tmp_path, line):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from pkg.functional import spmm\n")
    (package / "functional.py").write_text("import torch\nfrom pkg import pattern\n")
    (package / "pattern.py").write_text(f"def late():\n    {line}\n")
    planted = import_graph(package)
    assert circle_in(planted) == ["functional", "pattern", "functional"]
    assert upward_imports(planted) == {("pattern", "functional")}
