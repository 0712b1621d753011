"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
CSRC = REPOSITORY / "csrc"
