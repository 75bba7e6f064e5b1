"""Run compute-sanitizer over every kernel, to detect invalid memory accesses and races.

A check without a result, since its time ended or the tool does not support the device, is left out.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator

from benchmarks.case import Row
from benchmarks.processes import run_for

__all__ = ["find", "rows"]

TOOL = "compute-sanitizer"
FOLDERS = "/usr/local/cuda*/bin"  # locations of CUDA's tools outside the PATH
# Failed API calls are not reported: the allocator makes calls that may fail and handles that.
KINDS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
MOST_S, RESERVE_S = 240.0, 5.0
UNSUPPORTED = "Device not supported"  # printed by the tool, as in some containers


def rows(device: str, env: dict[str, str], left: Callable[[], float]) -> Iterator[Row]:
    """Yield a row of each check, or the reason why the checks are left out.

    Args:
        device: "cuda"; on a CPU the tool cannot observe kernels.
        env: environment in which the package can be imported.
        left: returns the seconds until the end of the time.
    """
    tool = find()
    if device != "cuda" or tool is None:
        where = f"{TOOL}: neither on the PATH nor in {FOLDERS}"
        yield {"left_out": where if device == "cuda" else f"{TOOL} needs a GPU"}
        return
    command = [sys.executable, "-m", "benchmarks.every_kernel", device]

    def outcome(kind: str, command: list[str], env: dict[str, str]) -> Row:
        result = run_for(command, env, min(MOST_S, left() - RESERVE_S))
        if result["rc"] is None:
            return {"left_out": f"{kind}: {result['why']}"}
        if UNSUPPORTED in result.get("end", ""):
            return {"left_out": f"{kind}: {TOOL}: {UNSUPPORTED}"}
        return {"op": "sanitizer", "implementation": kind, "right": result["rc"] == 0, **result}

    if left() <= RESERVE_S:
        yield {"left_out": "no time left"}
        return
    # A first run without the tool fills Triton's cache; the tool would slow the compiler down.
    alone = outcome("the kernels without the tool", command, env)
    yield alone
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind, options in KINDS.items() if alone.get("right") else ():
        if left() <= RESERVE_S:
            yield {"left_out": f"no time left for {kind}"}
            continue
        check = [tool, "--tool", kind, "--error-exitcode", "9", *options, *command]
        yield outcome(kind, check, env)


def find() -> str | None:
    """Return the tool's path: from the PATH, else from the newest CUDA folder."""
    folders = [os.environ.get("PATH", os.defpath), *sorted(glob.glob(FOLDERS), reverse=True)]
    return shutil.which(TOOL, path=os.pathsep.join(folders))
