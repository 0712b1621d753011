"""Where setup.py puts the compiled kernels, and why it put none there."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def find(name: str) -> Path | None:
    return next(PACKAGE.glob(f"{name}.*so"), None)


def build_error(name: str) -> str | None:
    """Repeats in one line the reason that setup.py left where the compilers failed and the package was installed."""
    report = PACKAGE / f"{name}.build_error.txt"
    return " ".join(report.read_text().split()) if report.exists() else None
