"""The commands of benchmarks/gpu.py run without a GPU, at tiny shapes with interpreted kernels."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import every_kernel, gpu, kernel_tests, lengths, peers, timing
from benchmarks.commands import Entry
from benchmarks.parts import scale
from benchmarks.profiling import by_category
from benchmarks.report import main
from fastadapt.kernels import checks
from fastadapt.models.recompute import POLICIES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "benchmarks" / "gpu.py")
#: Installed modules that can be imported on a machine with torch, Triton, transformers, numpy,
#: pytest, PyYAML and safetensors alone: those, and what they import. No other package of the locks,
#: and no installation of this one.
PRESENT = {
    *("torch", "torchgen", "functorch", "filelock", "mpmath", "networkx", "sympy"),
    *("typing_extensions", "triton", "numpy", "yaml", "_yaml", "safetensors"),
    *("pytest", "_pytest", "py", "iniconfig", "packaging", "pluggy", "pygments"),
    *(("tomli", "exceptiongroup") if sys.version_info < (3, 11) else ()),
    *("transformers", "huggingface_hub", "tokenizers", "regex", "tqdm", "fsspec", "click"),
    *("httpx2", "httpcore2", "h11", "anyio", "idna", "truststore", "typer", "annotated_doc"),
}
WITHOUT = f"""
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
class Few(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        spec = PathFinder.find_spec(name, *arguments)
        if spec is None or "." in name or name in {PRESENT}:
            return spec
        places = [spec.origin, *(spec.submodule_search_locations or ())]
        return None if any("site-packages" in str(place) for place in places) else spec
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Few]
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the script from another folder, with few packages, and without this PYTHONPATH."""
    packages = cwd / "packages"
    packages.mkdir(exist_ok=True)
    (packages / "sitecustomize.py").write_text(WITHOUT)
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--device", "cpu", "--commit", "abc"],
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def result_of(command: str, folder: Path) -> dict[str, Any]:
    """Run a whole command; return the content of its file."""
    output = folder / f"{command}.json"
    process = run(command, "--quick", "--seconds", "1800", "--output", str(output), cwd=folder)
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    result = json.loads(output.read_text())
    assert (result["right"], result["finished"], result["failed"]) == (True, True, {})
    assert (result["command"], result["commit"]) == (command, "abc")
    assert result["quick"] is True
    assert result["bounds"] == []  # of tiny shapes
    assert not [row for rows in result["parts"].values() for row in rows if "error" in row]
    assert len(result["sources"]) == 64
    assert {"torch", "triton", "python"} <= set(result["versions"])
    assert result["hardware"]["cpu"]
    assert result["roofs"]["copy_bytes_per_s"] > 0
    return result


def assert_timed(rows: list[dict[str, Any]], *names: str) -> None:
    """Rows of this library were right before they were timed, and list their kernels."""
    ours = [row for row in rows if row["kind"] == "ours"]
    assert set(names) <= {row["implementation"] for row in ours}
    for row in ours:
        assert row["right"] is True
        assert row["median_s"] > 0
        assert row["times_as_fast_as"]
        assert all(k["us"] >= 0 and k["calls"] > 0 and k["name"] for k in row["kernels"])
        assert row["kernels"]


@pytest.mark.slow
def test_kernels_are_checked_then_this_library_is_timed_before_compiled_code(
    tmp_path: Path,
) -> None:
    result = result_of("kernels", tmp_path)
    assert list(result["parts"]) == ["every kernel", "transcoder", "block", "shapes"]
    checks = result["parts"]["every kernel"]
    assert {row["op"] for row in checks} >= {"transcoder", "linear_kl", "nmse", "serving"}
    assert {row["implementation"] for row in checks} >= {"sparse", "triton", "chunked"}
    names = [row["implementation"] for row in result["parts"]["transcoder"]]
    assert names[:3] == ["encoder GEMM", "sparse", "triton"]
    assert names[-2:] == ["reference compiled", "plain compiled"]
    assert_timed(result["parts"]["transcoder"], "sparse", "triton")
    assert_timed(result["parts"]["block"], "chunked")
    assert set(result["left_out"]) <= {"peer eai-sparsify", "peer fla-core", "peer liger-kernel"}


@pytest.mark.slow
def test_steps_are_compared_timed_and_repeated(tmp_path: Path) -> None:
    result = result_of("step", tmp_path)
    parts = result["parts"]
    assert list(parts) == ["agreement", "step", "repeated step", "random lengths"]
    assert len(parts["agreement"]) == 3
    names = [row["implementation"] for row in parts["step"]]
    assert names == ["plain, checkpointed", *(f"ours, {policy}" for policy in POLICIES)]
    for row in parts["step"]:
        total = sum(category["us"] for category in row["categories"])
        assert total == pytest.approx(row["device_s"] * 1e6)
        assert {"wall_s", "peak_bytes", "reserved_bytes", "tokens_per_s"} <= set(row)
    assert [row["right"] for row in parts["repeated step"]] == [True, True]
    on, off = parts["random lengths"]
    assert on["lengths"] == off["lengths"]
    assert len(on["lengths"]) == len(on["first_s"]) == len(on["again_s"])
    assert on["attention"]
    assert main(["--results", str(tmp_path), "--no-plots"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "Checks: agreement: right (3); repeated step: right (2)." in page
    for row in parts["step"]:
        assert f"| 128 | {row['implementation']} | {row['median_s']:.4g} |" in page


@pytest.mark.slow
def test_checks_test_repeat_and_time_the_other_ops(tmp_path: Path) -> None:
    result = result_of("checks", tmp_path)
    parts = result["parts"]
    assert list(parts) == [
        *("tests", "repeats", "indices", "linear_kl", "topk", "serving", "sweep"),
        *("lengths", "sanitizer"),
    ]
    assert parts["tests"][0]["tests"] > 50
    assert parts["repeats"]
    names = [row["implementation"] for row in parts["linear_kl"]]
    order = [names.index(name) for name in ("GEMMs", "chunked", "triton", "reference")]
    assert sorted(order) == order
    assert names[-2:] == ["compiled chunks"] * 2
    for part in ("linear_kl", "topk", "serving", "sweep"):
        assert_timed(parts[part], "triton")
    assert {"indices", "sanitizer"} <= set(result["left_out"])


@pytest.mark.slow
def test_a_kill_leaves_the_results(tmp_path: Path) -> None:
    """Killed after the first row, the file is valid JSON with this row, marked as not finished."""
    output = tmp_path / "killed.json"
    command = [sys.executable, SCRIPT, "kernels", "--device", "cpu", "--quick"]
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


def make_run(*entries: Entry, seconds: float, only: list[str] | None = None) -> Any:
    """Return a run of these entries without measuring the machine."""
    run: Any = object.__new__(gpu.Run)
    run.options = SimpleNamespace(only=only, device="cpu", seconds=seconds)
    run.deadline = run.end = time.monotonic() + seconds
    run.lost, run.entries = False, entries
    run.result = {"parts": {}, "seconds": {}, "left_out": {}, "failed": {}}
    run.write = lambda: None
    return run


def rows_of(n: int, seconds: float, name: str = "x") -> Callable[[], Iterator[dict[str, Any]]]:
    def rows() -> Iterator[dict[str, Any]]:
        for i in range(n):
            time.sleep(seconds)
            yield {"op": name, "implementation": str(i)}

    return rows


@pytest.mark.slow
def test_later_parts_get_their_share_of_the_time_after_an_overrun() -> None:
    """The first part stops after the row in progress; unused time goes to later parts."""
    first, second = Entry("first", rows_of(9, 0.55), 1), Entry("second", rows_of(99, 0.05), 2)
    run = make_run(first, second, seconds=3)
    start = time.monotonic()
    run.work()
    assert time.monotonic() - start < 3.5
    assert len(run.result["parts"]["first"]) == 2
    assert len(run.result["parts"]["second"]) >= 5
    assert run.result["left_out"]["first"] == "stopped at its time limit after 2 rows"
    assert run.result["seconds"]["first"] == pytest.approx(1.1, abs=0.15)
    assert run.is_right


def test_a_row_that_does_not_end_is_interrupted() -> None:
    run = make_run(
        Entry("first", rows_of(1, 60), 1), Entry("second", rows_of(3, 0.01), 1), seconds=2
    )
    start = time.monotonic()
    run.work()
    assert time.monotonic() - start < 2
    assert run.result["left_out"] == {"first": "the row after 0 rows did not end in time"}
    assert len(run.result["parts"]["second"]) == 3


def test_a_part_without_time_is_left_out_and_wrong_if_named() -> None:
    for only in (None, ["first"]):
        run = make_run(Entry("first", rows_of(1, 0), 1), seconds=-1, only=only)
        run.work()
        assert run.result["left_out"] == {"first": "no time left"}
        assert run.is_right is (only is None)


def test_two_runs_of_a_day_have_two_files() -> None:
    from benchmarks.record import default_path

    first = default_path("NVIDIA X", "2026-01-02T03:04:05+00:00")
    assert first.name == "nvidia-x-2026-01-02-030405.json"
    assert first != default_path("NVIDIA X", "2026-01-02T03:04:06+00:00")


def test_non_finite_numbers_give_valid_json() -> None:
    from benchmarks.record import without_nan

    text = json.dumps(without_nan({"a": [math.nan, (1.5, -math.inf)], "b": "c"}), allow_nan=False)
    assert json.loads(text) == {"a": ["nan", [1.5, "-inf"]], "b": "c"}


@pytest.mark.slow
def test_a_failed_check_marks_the_run_and_measuring_continues(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code and file mark the run as wrong; the measurements are recorded."""
    wrong = {"op": "tests", "implementation": "kernels", "claim": "", "right": False, "why": "late"}
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel_tests, "rows", lambda **_: iter([wrong]))
    output = tmp_path / "wrong.json"
    only = ["--only", "tests", "--only", "topk"]
    options = ["checks", "--device", "cpu", "--quick", *only, "--output", str(output)]
    assert gpu.main(options) == 1
    result = json.loads(output.read_text())
    assert result["parts"]["tests"] == [wrong]
    assert result["right"] is False
    assert result["parts"]["topk"]


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
    entries = Entry("a", lambda: rows_until(error), 1), Entry("b", lambda: rows_until(None), 1)
    run = make_run(*entries, seconds=100)
    run.work()
    assert len(run.result["parts"]["a"]) == 1
    assert len(run.result["parts"].get("b", [])) == tried
    assert run.is_right is (error is None)
    assert list(run.result["failed"]) == (["a"] if error else []) + (["b"] if not tried else [])


def test_an_error_of_the_device_ends_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row records the error first; the next synchronisation raises the error again."""

    def dead(device: str) -> None:
        raise torch.AcceleratorError("illegal access")

    monkeypatch.setattr(timing, "synchronize", dead)
    row = {"op": "x", "implementation": "", "error": "Triton"}
    run = make_run(Entry("a", lambda: iter([row] * 3), 1), seconds=100)
    run.work()
    assert run.result["parts"]["a"] == [row]
    assert run.lost is True


def test_missing_peers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "missing", lambda: {"fla-core": "", "liger-kernel": ""})
    names = lengths.names(scale("cuda", quick=True))
    assert set(names) & set(lengths.PEERS) == {"eai-sparsify"}


@pytest.mark.quick("step")
@pytest.mark.parametrize(
    ("command", "parts"),
    [("kernels", "every kernel, transcoder, "), ("step", "agreement, "), ("checks", "tests, ")],
    ids=gpu.NAMES,
)
def test_an_unknown_part_is_refused_at_the_start(command: str, parts: str, tmp_path: Path) -> None:
    """All modules of the command are imported, without packages that a GPU machine may lack."""
    completed = run(command, "--quick", "--only", "nothing", cwd=tmp_path)
    assert completed.returncode == 1
    assert f"no part nothing; expected one of {parts}" in completed.stderr
    assert completed.stdout == ""


def test_several_reasons_are_recorded() -> None:
    rows: list[dict[str, Any]] = [{"left_out": "memcheck: late"}, {"left_out": "no time left"}]
    run = make_run(Entry("sanitizer", lambda: iter(rows), 1), seconds=100)
    run.work()
    assert run.result["left_out"] == {"sanitizer": "memcheck: late; no time left"}
    assert run.is_right


def test_a_kernel_that_no_case_launches_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are found in the modules of the ops."""
    monkeypatch.setattr(every_kernel, "ODD", (every_kernel.TINY,))
    monkeypatch.setattr(every_kernel, "checks_of", lambda *_: iter(()))
    monkeypatch.setattr(every_kernel, "runs_triton", lambda _: True)
    monkeypatch.setattr(every_kernel, "implementations", lambda _: [])
    *_, last = every_kernel.rows("cpu")
    assert last["right"] is False
    assert last["wrong"].startswith("not launched: ")
    assert {"mark", "sum_by_feature", "student_kernel"} <= set(every_kernel.kernels())
    assert "mark" in last["wrong"].split(": ")[1].split(", ")


def test_few_tokens_without_gradients_are_a_case(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty of a few tokens has a kernel of its own where no gradient is needed."""
    monkeypatch.setattr(checks, "ACTIVATIONS", {"relu": {}})
    cases = checks.checks_of(torch.device(device), every_kernel.TINY, torch.float32)
    with every_kernel.launches(every_kernel.kernels()) as launched:
        assert all(check.ok for check in itertools.islice(cases, 5))
    assert "cost_by_token" in launched


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")
def test_the_cases_launch_every_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens suffice: one call for few tokens, and a feature of more than 64 codes."""
    sizes = every_kernel.Sizes(1, 3, 16, 40), every_kernel.Sizes(1, 67, 8, 16)
    if device == "cpu":
        monkeypatch.setattr(every_kernel, "FEW", sizes[0])
        monkeypatch.setattr(every_kernel, "ODD", sizes[1:])
    for row in every_kernel.rows(device):
        assert row["right"], row
        if row["op"] == "every kernel":  # of the first dtype
            break


def test_kernels_have_one_category_and_this_librarys_their_own() -> None:
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matrix products",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": (
            "elementwise work and reductions"
        ),
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "Memcpy DtoD (Device -> Device)": "copies",
        "sum_by_token": "this library's kernels",
        "something": "other",
    }
    kernels = [{"name": name, "calls": 2, "us": 3.0} for name in names]
    categories = by_category(kernels, ["sum_by_token"])
    assert {c["category"]: c["us"] for c in categories} == dict.fromkeys(names.values(), 3.0)
