"""Run the kernels' tests on the device, in a separate process.

Also run the training test that needs a GPU: no step waits for the device.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.processes import run_for

__all__ = ["gpu_tests_of_training", "needing", "rows", "run_files"]

ROOT = Path(__file__).resolve().parent.parent
MOST_PROCESSES = 6
SHARD = "FASTADAPT_TESTS_SHARD"  # "i/n": run the tests i, i + n, i + 2n, ...
COUNTS = ("tests", "failures", "errors", "skipped")
TRAINING = ("test_no_sync.py", "test_feed.py::test_a_gpu_is_not_waited_for")
TRAINING_NEEDS = ("datasets", "tokenizers", "transformers")  # several are imported lazily


def rows(
    *, quick: bool, env: dict[str, str], left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Run the kernels' quick tests; yield counts, exit codes and the names of excluded files.

    Test files with missing imports are excluded. Tests that do not end in time count as failed;
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
    # Compilation on the host takes most of the time. Processes share the GPU's memory, of which
    # tests need little (one needs 9 GB), and Triton's cache, which is written atomically.
    n = 1 if quick else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    reports = Path(env["PYTHONPATH"].split(os.pathsep)[0])
    result = run_files(selected, left_out, reports, env, left(), n)
    names = [path.name for path in left_out]
    yield {"op": "tests", "implementation": "kernels", **result, "left_out_files": names}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Select every n-th test, if this module is loaded as a plugin of one of n processes."""
    if SHARD in os.environ:
        first, n = map(int, os.environ[SHARD].split("/"))
        items[:] = items[first::n]


def gpu_tests_of_training() -> tuple[list[Path], list[Path]]:
    """Return the tests of training to run, and those with missing imports."""
    tests = [ROOT / "tests" / "training" / name for name in TRAINING]
    return (tests, []) if all(map(_is_installed, TRAINING_NEEDS)) else ([], tests)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_files(
    selected: Sequence[Path],
    left_out: Sequence[Path],
    reports: Path,
    env: dict[str, str],
    seconds: float,
    n_processes: int,
) -> dict[str, Any]:
    """Run test files; return ``right``, counts, and the exit code and end of a failed process."""
    command = [sys.executable, "-m", "pytest", *map(str, selected), "-q", "-m", "not slow"]
    # Warnings differ between versions and are no errors here.
    command += ["-Wdefault", "-pno:cacheprovider", "-pno:xdist", "-pno:randomly", "--maxfail=5"]
    command += ["-pbenchmarks.kernel_tests", *(f"--ignore={p}" for p in left_out if p.exists())]

    def run(i: int) -> tuple[dict[str, Any], dict[str, int]]:
        report = reports / f"junit-{i}.xml"
        report.unlink(missing_ok=True)
        shard = {SHARD: f"{i}/{n_processes}"}
        outcome = run_for([*command, f"--junit-xml={report}"], env | shard, seconds, interrupt=True)
        suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
        return outcome, {key: int(suite.get(key, 0)) for key in COUNTS} if suite is not None else {}

    with ThreadPoolExecutor(n_processes) as pool:
        results = list(pool.map(run, range(n_processes)))
    counts = {key: sum(counts.get(key, 0) for _, counts in results) for key in COUNTS}
    # 5: a process without tests.
    failed = next((outcome for outcome, _ in results if outcome["rc"] not in (0, 5)), {"rc": 0})
    right = failed["rc"] == 0 and counts["tests"] > 0
    return {"right": right, **counts, "processes": n_processes, **failed}


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
