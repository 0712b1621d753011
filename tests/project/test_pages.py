"""The pages tell the truth: examples run, commands, links and paths exist, tables agree with the code."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import rosa_kernels as rk
from paths import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "models" / "README.md",
]
MOST_WORDS, MOST_NUMBERS = 1000, 80
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE_ENDINGS = (".py", ".md", ".h", ".cpp", ".cu", ".json", ".txt", ".toml", ".safetensors")
_SOURCE_FOLDERS = (".ci", "bench", "csrc", "docs", "models", "rosa_kernels", "tests")
_PLAINER = {
    r"\bmend(s|ed)?\b": "fixes",
    r"\bown GEMM\b": "our GEMM",
    r"\bby hand\b": "hand-written",
    r"\bways\b": "algorithms",
}
"""Words that the pages do without: regular expression -> what they say instead."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())


def prose_of(text: str) -> str:
    """A page without its fenced code."""
    return _FENCED.sub("", text)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line where it begins, code) of each example."""
    return [(text[: m.start(2)].count("\n"), m[2]) for m in _FENCED.finditer(text) if m[1] == "python"]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command that starts python, pytest or pip: in fenced and indented code and in backticks."""
    prose = prose_of(text)
    lines = [line for m in _FENCED.finditer(text) if m[1] != "python" for line in m[2].splitlines()]
    lines += [line for m in _INDENTED.finditer(prose) for line in m[0].splitlines()] + _IN_BACKTICKS.findall(prose)
    commands = []
    for part in (part for line in lines for part in line.split("&&")):
        words = part.split()
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words and words[0] in ("python", "pytest", "pip") and len(words) > 1:
            words = shlex.split(part, comments=True)
            commands.append(words[next(i for i, word in enumerate(words) if word in ("python", "pytest", "pip")) :])
    return commands


@functools.cache
def help_of(*command: str) -> str:
    run = subprocess.run([*command, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def faults_of_command(words: list[str]) -> list[str]:
    """What is wrong with a command: a file, a module, an extra or an option that is not there."""
    program, *arguments = words
    if program == "pip":
        extras = [extra for word in arguments if "[" in word for extra in re.findall(r"[\w-]+", word.split("[")[1])]
        known = (REPOSITORY / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
        return [f"no extra {extra}" for extra in extras if not re.search(rf"^{extra} = \[", known, re.MULTILINE)]
    if program == "python":
        by_module = arguments[0] == "-m"
        target, *rest = arguments[1:] if by_module else arguments
        found = importlib.util.find_spec(target) if by_module else (REPOSITORY / target).is_file()
        if not found:
            return [f"no module {target}" if by_module else f"no file {target}"]
        start, faults = (sys.executable, *(("-m", target) if by_module else (target,))), []
        if target == "setup.py":
            start = (*start, "build_ext")
    else:
        paths = [word for word in arguments if re.match(r"(tests|bench)\b", word)]
        faults = [f"no path {path}" for path in paths if not (REPOSITORY / path.split("::")[0]).exists()]
        folder = "bench" if paths and paths[0].startswith("bench") else "tests"
        start, rest = (sys.executable, "-m", "pytest", folder), arguments
    options = [word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    wanted = [option for option in options if option != "--help"]
    return faults + [f"no option {option}" for option in wanted if not is_option(option, help_of(*start))]


def is_option(option: str, text: str) -> bool:
    """Whether a help text names the option; of a short one, the letter without the value that may follow it."""
    name = option if option.startswith("--") else option[:2]
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


@functools.cache
def repository_paths() -> set[str]:
    """Every file and folder of the sources, from the root; a module also without its .py."""
    found = [path for path in REPOSITORY.iterdir() if path.is_file()]
    for folder in _SOURCE_FOLDERS:
        found += [REPOSITORY / folder, *(REPOSITORY / folder).rglob("*")]
    names = {path.relative_to(REPOSITORY).as_posix() for path in found if "__pycache__" not in path.parts}
    return names | {name.removesuffix(".py") for name in names}


def looks_like_a_path(span: str) -> bool:
    if re.fullmatch(r"[\w./-]*\w[\w./-]*", span) is None or span in _FILE_ENDINGS:
        return False
    return "/" in span or span.endswith(_FILE_ENDINGS)


def is_there(span: str) -> bool:
    """Whether the span is a path from the root, or the end of one."""
    name = span.rstrip("/")
    written_by_runs = name.split("/")[0] in (REPOSITORY / ".gitignore").read_text().replace("/", "").split()
    return written_by_runs or any(path == name or path.endswith("/" + name) for path in repository_paths())


@by_page
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in python_blocks(page.read_text()):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_the_quick_start_learns_and_loads_what_it_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for _, code in python_blocks(README.read_text()):
        exec(code, namespace)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] - 0.3
    batch = namespace["batches"][0]
    with torch.no_grad():
        logits = [namespace[name].eval()(batch).logits for name in ("model", "loaded")]
        assert not torch.equal(logits[0], namespace["pretrained"]().eval()(batch).logits)
    assert torch.equal(*logits)


@pytest.mark.exhaustive
@by_page
def test_commands_name_what_is_there(page):
    faults = {" ".join(words): faults_of_command(words) for words in commands_of(page.read_text())}
    assert not {command: fault for command, fault in faults.items() if fault}


@by_page
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link.split("#")[0] for link in _LINK.findall(prose_of(text)) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    spans = [span for span in _IN_BACKTICKS.findall(prose_of(text)) if looks_like_a_path(span)]
    assert [span for span in spans if not is_there(span)] == []


@by_page
def test_public_names_exist(page):
    names = re.findall(r"\brk\.([a-zA-Z_]\w*)", page.read_text())
    assert [name for name in names if not hasattr(rk, name)] == []


@by_page
def test_plain_words(page):
    prose = prose_of(page.read_text())
    assert {word: instead for word, instead in _PLAINER.items() if re.search(word, prose)} == {}


def test_readme_is_short():
    prose = prose_of(README.read_text())
    words, numbers = len(prose.split()), len(re.findall(r"\d+(?:[.,]\d+)*", prose))
    assert words <= MOST_WORDS and numbers <= MOST_NUMBERS, f"{words} words, {numbers} numbers"


API_ROWS = re.findall(r"^\| `(rk\.\w+\(.*\))` \| `(.*)` \|$", README.read_text(), re.MULTILINE)


def test_the_api_table_has_every_op():
    calls = " ".join(call for call, _ in API_ROWS)
    ops = ("lora_linear", "sparse_linear", "rosa_linear", "rosa_delta", "spmm", "sddmm", "csr_add")
    assert len(API_ROWS) == len(ops) and all(f"rk.{op}(" in calls for op in ops)


@pytest.mark.parametrize("call, equivalent", API_ROWS, ids=[call.split("(")[0] for call, _ in API_ROWS])
def test_the_api_table_is_true(call, equivalent):
    pattern = rk.CSRPattern.random((5, 7), 0.4, seed=0)
    values = torch.randn(pattern.nnz)
    rows, columns = pattern.row_of_entry(), pattern.col_indices.long()
    names = {
        "x": torch.randn(6, 7), "dy": torch.randn(6, 5), "W": torch.randn(5, 7), "b": torch.randn(5),
        "A": torch.randn(3, 7), "B": torch.randn(5, 3), "scaling": 0.5, "values": values, "pattern": pattern,
        "S": torch.zeros(5, 7).index_put((rows, columns), values), "rows": rows, "columns": columns,
        "rk": rk, "F": F,
    }  # fmt: skip
    torch.testing.assert_close(eval(call, names), eval(equivalent, names))


BROKEN = {
    "a command's file": "\n\n    python models/no_such.py --adapter rosa\n",
    "a command's module": "`python -m rosa_kernels.no_such`",
    "a command's option": "`pytest tests --no-such-option`",
    "a script's option": "```\npython models/predict.py --no-such runs/rosa\n```",
    "a test's path": "```\nA=1 pytest tests/no_such.py -q\n```",
    "an extra": '```\npip install -e ".[no_such]"\n```',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_command_is_found(text):
    (words,) = commands_of(text)
    assert faults_of_command(words)


@pytest.mark.parametrize("span, there", [
    ("rosa_kernels/no_such.py", False), ("no_such.md", False), ("tests/ops/no/", False), ("csrc/cpu/kernels.cpp", True),
    ("backends/reference", True), ("isa/", True), ("adapter_config.json", True), ("runs/rosa", True),
])  # fmt: skip
def test_a_broken_path_is_found(span, there):
    assert looks_like_a_path(span) and is_there(span) == there
