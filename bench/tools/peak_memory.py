"""Measures how many MB (10⁶ bytes) of memory a function takes at its peak, above a process with its libraries loaded.

The figure counts what the function holds (a model, its optimizer) and what its calls add. The races of whole models
use it. It runs this file as a process, which imports the libraries once, reads the name of a pickle from each line,
forks to run that pickle, and answers with a number.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import model_steps  # noqa: F401  the pickles need it, and the process loads it before it forks

_CALLS = 2  # the first step makes the optimizer's state, the second runs beside it
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


class PeakMemory:
    """A context in which megabytes(function) measures."""

    def __enter__(self):
        self._directory = tempfile.TemporaryDirectory()
        command = [sys.executable, __file__, str(torch.get_num_threads())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        return self

    def megabytes(self, function: Callable) -> float:
        """The function is pickled as it is now, with what it holds."""
        file = Path(self._directory.name) / "function"
        torch.save(function, file)
        print(file, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that measures memory failed: its message is on stderr")
        return float(answer)

    def __exit__(self, *exception):
        self._process.communicate()
        self._directory.cleanup()


def _serve(threads: str) -> None:
    """Computes nothing in this process, so that it has no threads that a fork would lose."""
    torch.set_num_threads(int(threads))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(_measured(line.rstrip("\n")), flush=True)
            return
        if os.waitpid(child, 0)[1] != 0:
            sys.exit("peak_memory: the child failed")


def _measured(file: str) -> float:
    for dtype in (torch.float32, torch.bfloat16):  # a small step brings the libraries into memory
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        layer(torch.ones(64, 64, dtype=dtype)).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()
    before = _peak()
    function = torch.load(file, weights_only=False)
    for _ in range(_CALLS):
        function()
    return _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / 1e6


if __name__ == "__main__":
    _serve(*sys.argv[1:])
