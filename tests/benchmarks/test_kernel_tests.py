"""The kernels' tests as gpu.py runs them: side by side, in time, and what is said of them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from benchmarks import exactness, kernel_tests

SLOW = "import time\ndef test_{name}():\n    time.sleep({seconds})\n"
side_by_side = pytest.mark.skipif(
    importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed"
)


def ran(folder: Path, seconds: float, n_processes: int) -> dict:
    return kernel_tests.run_files(
        [folder], [], folder / "junit.xml", dict(os.environ), seconds, n_processes
    )


@pytest.mark.parametrize(
    "n_processes", [1, pytest.param(2, marks=[side_by_side, pytest.mark.slow])]
)
def test_out_of_time_the_tests_that_ended_are_counted(tmp_path: Path, n_processes: int) -> None:
    (tmp_path / "test_a.py").write_text("def test_one(): ...\ndef test_two(): ...\n")
    (tmp_path / "test_b.py").write_text(SLOW.format(name="long", seconds=120))
    done = ran(tmp_path, 24, n_processes)
    assert done["right"] is False
    assert done["rc"] is None
    assert done["why"] == "not finished in 24 s"
    assert done["tests"] >= 2
    if n_processes == 1:  # with several, the report is written before xdist waits for its workers
        assert "2 passed" in done["end"]


@side_by_side
def test_side_by_side_they_all_run_and_one_that_fails_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one(): ...\ndef test_two(): assert False\n")
    (tmp_path / "test_b.py").write_text("def test_three(): ...\n")
    done = ran(tmp_path, 60, 2)
    counts = {key: done[key] for key in ("right", "tests", "failures", "errors", "processes")}
    assert counts == {"right": False, "tests": 3, "failures": 1, "errors": 0, "processes": 2}


def test_tests_of_training_come_along_where_they_can_run(monkeypatch) -> None:
    tests, left_out = kernel_tests.gpu_tests_of_training()
    assert ([test.name for test in tests], left_out) == (list(kernel_tests.TRAINING), [])
    for test in tests:  # they are where they are looked for
        file, _, name = str(test).partition("::")
        assert f"def {name}" in Path(file).read_text()
    monkeypatch.setattr(kernel_tests, "TRAINING_NEEDS", ("no_such_package",))
    assert kernel_tests.gpu_tests_of_training() == ([], tests)


def test_a_claim_that_fails_is_a_row_and_the_next_is_looked_at() -> None:
    def broken() -> str:
        raise ValueError("no such shape")

    rows = [
        exactness.check_claim("op", "ours", "a claim", wrong)
        for wrong in (broken, str, lambda: "x")
    ]
    assert [row["right"] for row in rows] == [False, True, False]
    assert rows[0]["error"] == "ValueError: no such shape"
