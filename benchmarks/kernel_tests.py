"""Run the kernels' tests on the device, in a separate process.

The tests of training that need a GPU (no step synchronises) run too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import run_for

__all__ = ["gpu_tests_of_training", "needing", "run_files", "run_tests"]

ROOT = Path(__file__).resolve().parent.parent
TESTS_S = 170.0
MOST_PROCESSES = 6
TRAINING = ("test_no_sync.py", "test_feed.py::test_a_gpu_is_not_waited_for")
TRAINING_NEEDS = ("datasets", "tokenizers", "transformers")  # several are imported lazily


def run_tests(env: dict[str, str], *, quick: bool, seconds: float = TESTS_S) -> dict[str, Any]:
    """Run the kernels' quick tests; return counts, the exit code and the names of excluded files.

    Test files with missing imports are excluded. Tests that exceed ``seconds`` count as failed;
    the counts then include the completed tests only.
    """
    folder = ROOT / "tests" / "kernels"
    left_out = [] if _is_installed("hypothesis") else needing("hypothesis", folder)
    if quick:
        selected = [folder / "test_testing.py"]
        left_out = [file for file in left_out if file in selected]
    else:
        training, without = gpu_tests_of_training()
        selected = [folder, *training]
        # Tests that compile ahead of time need no GPU.
        left_out += [*without, folder / "compiled"]
    report = Path(env["PYTHONPATH"].split(os.pathsep)[0]) / "junit.xml"
    n_processes = 1
    if not quick and _is_installed("xdist"):
        # Compilation on the host takes most of the time. Processes share the GPU's memory, of which
        # tests need little (one needs 9 GB), and Triton's cache, which is written atomically.
        n_processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    result = run_files(selected, left_out, report, env, seconds, n_processes)
    return {**result, "left_out": [path.name for path in left_out]}


def gpu_tests_of_training() -> tuple[list[Path], list[Path]]:
    """Return the tests of training to run, and those with missing imports."""
    tests = [ROOT / "tests" / "training" / name for name in TRAINING]
    return (tests, []) if all(map(_is_installed, TRAINING_NEEDS)) else ([], tests)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_files(
    selected: Sequence[Path],
    left_out: Sequence[Path],
    report: Path,
    env: dict[str, str],
    seconds: float,
    n_processes: int,
) -> dict[str, Any]:
    """Run test files; return ``right``, counts, the exit code and the end of the output."""
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *map(str, selected), "-q", "-m", "not slow"]
    # Warnings differ between versions and are no errors here.
    command += ["-Wdefault", "-pno:cacheprovider", "--maxfail=5", f"--junit-xml={report}"]
    command += [f"--ignore={path}" for path in left_out if path.exists()]
    if n_processes > 1:
        command += ["-n", str(n_processes), "--dist", "worksteal"]
    outcome = run_for(command, env, seconds, interrupt=True)
    suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
    keys = ("tests", "failures", "errors", "skipped")
    counts = {key: int(suite.get(key, 0)) for key in keys} if suite is not None else {}
    return {"right": outcome["rc"] == 0, **counts, "processes": n_processes, **outcome}


def needing(package: str, folder: Path) -> list[Path]:
    """Return test files that import the package directly or through a file of their folder."""
    sources = {path: path.read_text() for path in sorted(folder.glob("*.py"))}
    wanted = {package}
    while True:
        imports = re.compile(rf"^(?:from|import) (?:{'|'.join(sorted(wanted))})\b", re.MULTILINE)
        importing = {path for path, text in sources.items() if imports.search(text)}
        if wanted >= {path.stem for path in importing}:
            return sorted(path for path in importing if path.name.startswith("test_"))
        wanted |= {path.stem for path in importing}
