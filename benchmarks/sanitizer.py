"""compute-sanitizer over a small run of every kernel: bad accesses of memory, and races."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.processes import run_for

__all__ = ["find", "sanitize"]

TOOL = "compute-sanitizer"
FOLDERS = "/usr/local/cuda*/bin"  # where CUDA's tools lie that are on no PATH
# The allocator tries to reserve what may not exist and handles the failure: no error of a kernel.
KINDS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
MOST_S, RESERVE_S = 240.0, 20.0


def sanitize(
    device: str, env: dict[str, str], left: Callable[[], float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of each check. A requested check that did not run is not right.

    Args:
        device: "cuda"; on a CPU the tool sees no kernel.
        env: in which the package is importable.
        left: seconds until the end of the whole run.
    """
    failed = {"right": False, "ran": False}
    tool = find()
    if tool is None:
        yield "sanitizer", failed | {"why": f"{TOOL}: neither on the PATH nor in {FOLDERS}"}
        return
    command = [sys.executable, "-m", "benchmarks.every_kernel", device]
    # Without the tool, which would slow Triton's compilers down too: its cache is full afterwards.
    alone = run_for(command, env, min(MOST_S, left() - RESERVE_S))
    if alone["rc"] != 0:
        yield "sanitizer", failed | alone | {"why": "the kernels do not run without it"}
        return
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind, options in KINDS.items():
        seconds = min(MOST_S, left() - RESERVE_S)
        if seconds <= 0:
            yield kind, failed | {"why": "no time left"}
            continue
        check = [tool, "--tool", kind, "--error-exitcode", "9", *options, *command]
        done = run_for(check, env, seconds)
        yield kind, {"right": done["rc"] == 0, "ran": True, **done}


def find() -> str | None:
    """The tool, of the newest CUDA where it is not on the PATH."""
    folders = [os.environ.get("PATH", os.defpath), *sorted(glob.glob(FOLDERS), reverse=True)]
    return shutil.which(TOOL, path=os.pathsep.join(folders))
