"""The kernels' tests as run by gpu.py: in parallel, with a time limit, and their report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import exactness, kernel_tests

SLOW = "import time\ndef test_{name}():\n    time.sleep({seconds})\n"


def run_files(folder: Path, seconds: float, n_processes: int) -> dict:
    env = dict(os.environ) | {"PYTHONPATH": str(kernel_tests.ROOT)}
    return kernel_tests.run_files([folder], [], folder, env, seconds, n_processes)


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_completed_tests_are_counted_after_a_timeout(tmp_path: Path, n_processes: int) -> None:
    (tmp_path / "test_a.py").write_text("def test_one(): ...\ndef test_two(): ...\n")
    (tmp_path / "test_b.py").write_text(SLOW.format(name="long", seconds=120))
    result = run_files(tmp_path, 24, n_processes)
    assert result["right"] is False
    assert result["rc"] is None
    assert result["why"] == "not finished in 24 s"
    assert result["tests"] >= 2
    assert f"{3 - n_processes} passed" in result["end"]


def test_all_tests_run_in_parallel_and_a_failure_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one(): ...\ndef test_two(): assert False\n")
    (tmp_path / "test_b.py").write_text("def test_three(): ...\n")
    result = run_files(tmp_path, 60, 2)
    counts = {key: result[key] for key in ("right", "tests", "failures", "errors", "processes")}
    assert counts == {"right": False, "tests": 3, "failures": 1, "errors": 0, "processes": 2}


def test_tests_of_training_run_if_their_imports_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tests, left_out = kernel_tests.gpu_tests_of_training()
    assert ([test.name for test in tests], left_out) == (list(kernel_tests.TRAINING), [])
    for test in tests:  # the named tests exist
        file, _, name = str(test).partition("::")
        assert f"def {name}" in Path(file).read_text()
    monkeypatch.setattr(kernel_tests, "TRAINING_NEEDS", ("no_such_package",))
    assert kernel_tests.gpu_tests_of_training() == ([], tests)


def test_an_error_in_a_check_is_recorded_in_its_row() -> None:
    def broken() -> str:
        raise ValueError("no such shape")

    rows = [
        exactness.check_claim("op", "ours", "a claim", wrong)
        for wrong in (broken, str, lambda: "x")
    ]
    assert [row["right"] for row in rows] == [False, True, False]
    assert rows[0]["error"] == "ValueError: no such shape"
