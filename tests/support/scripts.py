"""Scripts run as `python SCRIPT ARGUMENTS` runs them, but in this process, which has imported PyTorch already."""

import runpy
import sys
from unittest import mock


def run_script(path: str, *arguments) -> None:
    """Raises what the script raises; a script that ends with an error raises SystemExit with its message."""
    with mock.patch.object(sys, "argv", [path, *map(str, arguments)]):
        runpy.run_path(path, run_name="__main__")
