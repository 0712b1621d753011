"""Pytest in processes of its own: what an environment variable decides (an interpreter, an emulation, an instruction
set) is decided when a process starts."""

import os
import re
import subprocess
import sys

from paths import REPOSITORY, TESTS

CORES = max(1, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_passed(
    files: tuple[str, ...], environment: dict[str, str], *options: str, every: int = 1, processes: int = CORES
) -> int:
    """How many of the files' tests passed; none may fail.

    The processes share every n-th test, counted through all that the environment takes. An n that shares no factor with
    the numbers of a test's parameters meets each of their values.
    """
    # -s: sanitizers write past pytest's capture
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--tb=short", "--exhaustive"]
    command += [*options, *(str(TESTS / name) for name in files)]
    running = [
        subprocess.Popen(
            [*command, f"--part={part * every}/{processes * every}"],
            env=os.environ | environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs):
        assert process.returncode == 0, f"{output[:6000]}\n...\n{output[-6000:]}"
    passed = sum(int(count) for output in outputs for count in re.findall(r"(\d+) passed", output))
    print(f"{passed} tests passed, every {every}. of {', '.join(files)}")
    return passed
