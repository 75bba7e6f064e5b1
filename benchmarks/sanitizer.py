"""compute-sanitizer over a small run of every kernel: bad accesses of memory, and races."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.processes import ended

__all__ = ["sanitize"]

TOOL = "compute-sanitizer"
FOLDERS = "/usr/local/cuda*/bin"  # where CUDA's tools lie that are on no PATH
# The allocator asks for what may not be there, and is prepared: no error of a kernel.
KINDS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
MOST_S, RESERVE_S = 240.0, 20.0


def sanitize(
    device: str, env: dict[str, str], left: Callable[[], float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of each check. One that was asked for and did not run is not right.

    Args:
        device: "cuda"; on a CPU the tool sees no kernel.
        env: in which the package is found.
        left: seconds until the end of the whole run.
    """
    tool = find()
    if tool is None:
        why = f"{TOOL}: neither on the PATH nor in {FOLDERS}"
        yield "sanitizer", {"right": False, "ran": False, "why": why}
        return
    command = [sys.executable, "-m", "benchmarks.every_kernel", device]
    # Without the tool, which would slow Triton's compilers down too: its cache is full afterwards.
    alone = ended(command, env, _seconds(left))
    if alone["rc"] != 0:
        why = "the kernels do not run without it"
        yield "sanitizer", {"right": False, "ran": False, **alone, "why": why}
        return
    for kind, options in KINDS.items():
        seconds = _seconds(left)
        if seconds <= 0:
            yield kind, {"right": False, "ran": False, "why": "no time left"}
            continue
        argv = [tool, "--tool", kind, "--error-exitcode", "9", *options, *command]
        done = ended(argv, env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, seconds)
        yield kind, {"right": done["rc"] == 0, "ran": True, **done}


def find() -> str | None:
    """The tool, of the newest CUDA where it is not on the PATH."""
    folders = [os.environ.get("PATH", os.defpath), *sorted(glob.glob(FOLDERS), reverse=True)]
    return shutil.which(TOOL, path=os.pathsep.join(folders))


def _seconds(left: Callable[[], float]) -> float:
    return min(MOST_S, left() - RESERVE_S)
