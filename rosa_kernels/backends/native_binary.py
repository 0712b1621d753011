"""Where setup.py puts the compiled kernels, and why it put none there."""

import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# A free-threaded Python loads no abi3 binary, so setup.py names the file for that Python alone.
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") if sysconfig.get_config_var("Py_GIL_DISABLED") else ".abi3.so"


def file_name(name: str) -> str:
    """The name of the file that setup.py makes for "_C" or "_cuda"."""
    return f"{name}{_SUFFIX}"


def missing_ops(namespace, ops: tuple[str, ...]) -> str:
    """The operators that a loaded library lacks, because it was built from other sources than this package's."""
    return ", ".join(name for name in ops if not hasattr(namespace, name))


def build_error(name: str) -> str | None:
    """Repeats in one line the reason that setup.py left where the compilers failed and the package was installed."""
    report = PACKAGE / f"{name}.build_error.txt"
    return " ".join(report.read_text().split()) if report.exists() else None
