"""benchmarks/gpu.py runs all parts without a GPU, at tiny shapes with interpreted kernels."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import sanitizer

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the script from another folder and without this process's PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", *arguments],
        cwd=cwd,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def completed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("results")
    output = folder / "tiny.json"
    return run("--quick", "--output", str(output), "--commit", "abc", cwd=folder), output


@pytest.fixture(scope="module")
def result(completed: tuple[subprocess.CompletedProcess[str], Path]) -> dict:
    process, output = completed
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
def test_every_part_is_checked_and_measured(result: dict[str, Any]) -> None:
    assert result["right"] is True
    assert result["finished"] is True
    assert result["checks"]["tests"]["tests"] > 50
    assert result["checks"]["repeats"]["rows"]
    parts = ["transcoder", "linear_kl", "topk", "serving", "sweep", "block", "shapes", "lengths"]
    assert list(result["parts"]) == parts
    assert all(result["parts"].values())


@pytest.mark.slow
def test_every_row_of_ours_was_right_before_it_was_timed(result: dict[str, Any]) -> None:
    rows = [r for name, part in result["parts"].items() for r in part if name != "lengths"]
    ours = [r for r in rows if r["kind"] == "ours"]
    assert {"sparse", "triton", "chunked"} <= {r["implementation"] for r in ours}
    for row in ours:
        assert row["right"] is True
        assert row["median_s"] > 0
        assert row["times_as_fast_as"]


@pytest.mark.slow
def test_linear_kl_of_this_library_runs_before_slow_steps(result: dict[str, Any]) -> None:
    names = [row["implementation"] for row in result["parts"]["linear_kl"]]
    order = {name: names.index(name) for name in ("GEMMs", "chunked", "triton", "reference")}
    assert sorted(order.values()) == list(order.values())
    ours = next(r for r in result["parts"]["linear_kl"] if r["implementation"] == "triton")
    assert {"GEMMs", "reference"} <= set(ours["times_as_fast_as"])


@pytest.mark.slow
def test_the_environment_is_recorded(result: dict[str, Any]) -> None:
    assert result["commit"] == "abc"
    assert len(result["sources"]) == 64
    assert {"torch", "triton", "python"} <= set(result["versions"])
    assert result["hardware"]["cpu"]
    assert result["roofs"]["copy_bytes_per_s"] > 0
    assert result["quick"] is True


@pytest.mark.slow
def test_tiny_shapes_have_no_bounds(result: dict[str, Any]) -> None:
    assert result["bounds"] == []


@pytest.mark.slow
def test_a_single_part_runs_without_the_tests(tmp_path: Path) -> None:
    output = tmp_path / "one.json"
    completed = run("--quick", "--only", "block", "--output", str(output), cwd=tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    result = json.loads(output.read_text())
    assert (list(result["checks"]), list(result["parts"])) == ([], ["block"])


def test_a_kill_leaves_the_results(tmp_path: Path) -> None:
    """Killed after the first row, the file is valid JSON with this row, marked as not finished."""
    output = tmp_path / "killed.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"]
    process = subprocess.Popen(
        [*command, "--only", "block", "--output", str(output)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]  # the machine, one row, the next
    process.kill()
    process.communicate()
    assert lines[1].startswith("  nmse")
    result = json.loads(output.read_text())
    assert result["finished"] is False
    assert [row["op"] for row in result["parts"]["block"]][:1] == ["nmse"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["killed.json"]


@pytest.mark.parametrize(
    ("only", "left", "part_s", "n_rows"),
    [(None, 100, -1, 1), (["x"], 100, -1, 5), (["x"], -1, 100, 1), (None, 100, 100, 5)],
)
def test_time_limits_of_parts_and_of_the_run(
    only: list[str] | None, left: int, part_s: int, n_rows: int
) -> None:
    from benchmarks.gpu import Run

    state: Any = SimpleNamespace(
        options=SimpleNamespace(only=only),
        deadline=time.monotonic() + left,
        result={"cut_short": []},
        write=lambda: None,
    )
    results: list[dict[str, Any]] = []
    rows = ({"op": "x", "implementation": str(i)} for i in range(5))
    Run.collect(state, "x", rows, results, part_s)
    assert len(results) == n_rows
    assert state.result["cut_short"] == ([] if n_rows == 5 else ["x"])


def test_two_runs_of_a_day_have_two_files() -> None:
    from benchmarks.record import default_path

    first = default_path("NVIDIA X", "2026-01-02T03:04:05+00:00")
    assert first.name == "nvidia-x-2026-01-02-030405.json"
    assert first != default_path("NVIDIA X", "2026-01-02T03:04:06+00:00")


def test_non_finite_numbers_give_valid_json() -> None:
    from benchmarks.record import without_nan

    text = json.dumps(without_nan({"a": [math.nan, (1.5, -math.inf)], "b": "c"}), allow_nan=False)
    assert json.loads(text) == {"a": ["nan", [1.5, "-inf"]], "b": "c"}


def test_a_failed_check_marks_the_run_and_measuring_continues(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code and file mark the run as wrong; the measurements are recorded."""
    from benchmarks import exactness, gpu, kernel_tests, lengths, parts

    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel_tests, "run_tests", lambda *_, **__: {"right": False, "why": "late"})
    monkeypatch.setattr(parts, "PARTS", {"block": parts.PARTS["block"]})
    for module, name in ((exactness, "repeats"), (lengths, "rows")):
        monkeypatch.setattr(module, name, lambda *_, **__: iter(()))
    output = tmp_path / "wrong.json"
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(output)]) == 1
    result = json.loads(output.read_text())
    assert result["checks"]["tests"] == {"right": False, "why": "late"}
    assert result["right"] is False
    assert result["parts"]["block"]


def rows_until(error: Exception | None) -> Iterator[dict[str, str]]:
    yield {"op": "x", "implementation": "1"}
    if error:
        raise error


@pytest.mark.parametrize(
    ("error", "tried"),
    [(None, 1), (ValueError("no such shape"), 1), (torch.AcceleratorError("illegal access"), 0)],
)
def test_a_failed_part_is_recorded_and_a_failed_device_is_not_used_again(
    error: Exception | None, tried: int
) -> None:
    from benchmarks.gpu import Run

    run: Any = object.__new__(Run)
    run.lost, run.deadline = False, time.monotonic() + 100
    run.options = SimpleNamespace(only=None, device="cpu")
    run.result = {"cut_short": [], "failed": {}, "seconds": {}, "checks": {}, "parts": {}}
    run.write = lambda: None
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    assert run.attempt("a", lambda: rows_until(error), first, 100) is (error is None)
    assert len(first) == 1
    run.attempt("b", lambda: rows_until(None), second, 100)
    assert len(second) == tried
    assert run.is_right is (error is None)
    assert list(run.result["failed"]) == (["a"] if error else []) + (["b"] if not tried else [])


def test_an_error_of_the_device_ends_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row records the error first; the next synchronisation raises the error again."""
    from benchmarks import timing
    from benchmarks.gpu import Run

    def dead(device: str) -> None:
        raise torch.AcceleratorError("illegal access")

    monkeypatch.setattr(timing, "synchronize", dead)
    state: Any = SimpleNamespace(
        options=SimpleNamespace(only=None, device="cuda"),
        deadline=time.monotonic() + 100,
        write=lambda: None,
    )
    results: list[dict[str, Any]] = []
    rows = ({"op": "x", "implementation": str(i), "error": "Triton"} for i in range(3))
    with pytest.raises(torch.AcceleratorError):
        Run.collect(state, "x", rows, results, 100)
    assert len(results) == 1


def test_missing_peers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import lengths, peers
    from benchmarks.parts import scale

    monkeypatch.setattr(peers, "missing", lambda: {"fla-core": "", "liger-kernel": ""})
    names = lengths.names(scale("cuda", quick=True))
    assert set(names) & set(lengths.PEERS) == {"eai-sparsify"}


def test_an_unknown_part_is_refused_at_the_start(tmp_path: Path) -> None:
    completed = run("--quick", "--sanitizer", "--only", "nothing", cwd=tmp_path)
    assert completed.returncode == 1
    assert "no part nothing; expected one of transcoder, " in completed.stderr
    assert completed.stdout == ""


@pytest.mark.slow
def test_a_missing_sanitizer_is_a_failed_check(tmp_path: Path) -> None:
    if sanitizer.find():
        pytest.skip("compute-sanitizer is installed")
    output = tmp_path / "sanitizer.json"
    completed = run("--quick", "--only", "sanitizer", "--output", str(output), cwd=tmp_path)
    assert completed.returncode == 1, completed.stdout + completed.stderr
    result = json.loads(output.read_text())
    assert result["checks"]["sanitizer"]["ran"] is False
    assert (result["right"], result["parts"]) == (False, {})
