"""Run compute-sanitizer over every kernel, to detect invalid memory accesses and races."""

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
FOLDERS = "/usr/local/cuda*/bin"  # locations of CUDA's tools outside the PATH
# Failed API calls are not reported: the allocator makes calls that may fail and handles that.
KINDS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
MOST_S, RESERVE_S = 240.0, 20.0


def sanitize(
    device: str, env: dict[str, str], left: Callable[[], float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and result of each check. A check that did not run counts as failed.

    Args:
        device: "cuda"; on a CPU the tool cannot observe kernels.
        env: environment in which the package can be imported.
        left: returns the seconds until the end of the run.
    """
    failed = {"right": False, "ran": False}
    tool = find()
    if tool is None:
        yield "sanitizer", failed | {"why": f"{TOOL}: neither on the PATH nor in {FOLDERS}"}
        return
    command = [sys.executable, "-m", "benchmarks.every_kernel", device]
    # A first run without the tool fills Triton's cache; the tool would slow the compiler down.
    alone = run_for(command, env, min(MOST_S, left() - RESERVE_S))
    if alone["rc"] != 0:
        yield "sanitizer", failed | alone | {"why": "the kernels do not run without the tool"}
        return
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind, options in KINDS.items():
        seconds = min(MOST_S, left() - RESERVE_S)
        if seconds <= 0:
            yield kind, failed | {"why": "no time left"}
            continue
        check = [tool, "--tool", kind, "--error-exitcode", "9", *options, *command]
        outcome = run_for(check, env, seconds)
        yield kind, {"right": outcome["rc"] == 0, "ran": True, **outcome}


def find() -> str | None:
    """Return the tool's path: from the PATH, else from the newest CUDA folder."""
    folders = [os.environ.get("PATH", os.defpath), *sorted(glob.glob(FOLDERS), reverse=True)]
    return shutil.which(TOOL, path=os.pathsep.join(folders))
