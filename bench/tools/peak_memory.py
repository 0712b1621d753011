"""Peak memory of a function in a fresh process: MB (10⁶ bytes) of resident memory above that of a process with its libraries loaded.

Counted is what the function holds (a model, its optimizer) and what calls add. The script reads a pickle's name a line and
answers with a number; it imports once and forks for each.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import model_steps  # noqa: F401  what the pickles are made of, loaded before the processes fork

_CALLS = 2  # the first step makes the optimizer's state, the second runs beside it
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


class PeakMemory:
    """A context; inside it megabytes(function) measures."""

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
    """This process computes nothing, so that it has no threads yet that a fork would lose."""
    torch.set_num_threads(int(threads))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(_measured(line.rstrip("\n")), flush=True)
            return
        if os.waitpid(child, 0)[1] != 0:
            sys.exit("peak_memory: the child failed")


def _measured(file: str) -> float:
    for dtype in (torch.float32, torch.bfloat16):  # a small step: libraries come into memory when they are first used
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
