"""Bounds, tables and plots of a synthetic result."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.bounds import BOUNDS, LIMITS, bounds

MAIN = {"T": 7500, "d": 3584, "F": 8192}


def row(implementation: str, seconds: float, kind: str = "ours", **shape: float) -> dict:
    return {
        "op": "synthetic",
        "implementation": implementation,
        "kind": kind,
        "shape": MAIN | shape,
        "dtype": "bfloat16",
        "measured_L0": shape.get("L0", 0.0),
        "right": True,
        "median_s": seconds,
        "spread_s": seconds / 100,
        "peak_bytes": 3_000_000_000,
        "result_bytes": 2_000_000_000,
        "flops": 1e12,
        "bytes": 1e9,
        "share_of_roof": 0.5,
        "share_of_copy": 0.8,
        "times_as_fast_as": {} if kind == "reference" else {"reference": 10 / seconds},
    }


def adapter(l0: float, gemm: float, reference: float, compiled: float, triton: float) -> list[dict]:
    return [
        row("reference", reference, "reference", L0=l0),
        row("reference compiled", compiled, "reference", L0=l0),
        row("encoder GEMM", gemm, "floor", L0=l0),
        row("triton", triton, L0=l0),
    ]


def verdicts(parts: dict, gpu: str = "NVIDIA H200") -> dict[str, tuple[float, bool]]:
    return {b["claim"]: (b["measured"], b["met"]) for b in bounds(parts, gpu)}


def test_each_claim_is_compared_with_its_bound() -> None:
    parts = {"transcoder": [*adapter(1, 2, 10, 8, 3), *adapter(10, 2, 10, 8, 4)]}
    assert verdicts(parts) == {
        "L0 1: time over the encoder GEMM's (triton)": (1.5, False),
        "L0 1: times as fast as the reference (triton)": (pytest.approx(10 / 3), False),
        "L0 10: time over the encoder GEMM's (triton)": (2.0, True),
        "L0 10: times as fast as the reference (triton)": (2.5, False),
        "any L0: time over the compiled reference's, worst at L0 10": (0.5, True),
    }
    assert verdicts(parts, "NVIDIA H100")["L0 1: time over the encoder GEMM's (triton)"] == (
        1.5,
        True,
    )


def test_the_worst_density_decides() -> None:
    parts = {"transcoder": adapter(1, 2, 10, 8, 3), "sweep": adapter(50, 2, 10, 8, 9)}
    claim = "any L0: time over the compiled reference's, worst at L0 50"
    assert verdicts(parts)[claim] == (1.125, False)


def test_linear_kl_is_compared_with_products_peers_and_single_calls() -> None:
    rows = [
        row("GEMMs", 10, "floor", S=3),
        row("triton", 11, S=3),
        row("triton, 3 single calls", 12, S=3),
        row("GEMMs", 10, "floor", S=1),
        row("triton", 10, S=1),
        row("fla-core", 15, "peer", S=1),
        row("liger-kernel", 13, "peer", S=1),
    ]
    assert verdicts({"linear_kl": rows}) == {
        "1 student: time over the GEMMs'": (1.0, True),
        "1 student: times as fast as the fastest of fla-core and liger-kernel": (1.3, False),
        "1 student: GB over inputs and outputs": (1.0, True),
        "3 students: time over the GEMMs'": (1.1, True),
        "3 students: times as fast as 3 single calls": (pytest.approx(12 / 11), False),
        "3 students: GB over inputs and outputs": (1.0, True),
    }


def test_rows_without_time_or_of_other_shapes_have_no_verdict() -> None:
    untimed = row("triton", 1, L0=1)
    del untimed["median_s"]
    narrow = row("triton", 1, L0=1, d=64)
    assert bounds({"transcoder": [untimed, narrow, row("reference", 2, L0=1)]}, "H200") == []


def test_every_bound_applies_to_rows_and_has_a_reason() -> None:
    """Every bound applies to a row of one of the parts' implementations and shapes."""
    names = {name for bound in BOUNDS for name in (*bound.ours, *bound.others)}
    shapes: dict[str, dict[str, list[Any]]]
    shapes = {"transcoder": {"L0": [0.1, 1, 10]}, "sweep": {"L0": [1]}, "topk": {"k": [8]}}
    shapes |= {"linear_kl": {"S": [1, 3]}, "serving": {"T": [1, 64]}}
    parts = {
        part: [
            row(name.format(S=3), 1.0, **{key: value}) for value in values for name in sorted(names)
        ]
        for part, by in shapes.items()
        for key, values in by.items()
    }
    for bound in BOUNDS:
        assert list(bound.verdicts(parts, "H200")), bound.claim
        assert len(bound.reason) > 40, bound.claim
        assert (bound.at_most is None) != (bound.at_least is None)


def test_every_limit_is_asserted_by_a_benchmark_and_has_a_reason() -> None:
    files = Path(report.__file__).parent.glob("bench_*.py")
    source = "".join(path.read_text() for path in files)
    for name, limit in LIMITS.items():
        assert f'"{name}"' in source, name
        assert len(limit.reason) > 40, name


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [*adapter(1, 2, 10, 8, 3), *adapter(10, 2, 10, 8, 4)]
    failed = {**row("triton", 1, L0=100), "right": False, "wrong": "out: too far\nand more"}
    del failed["median_s"]
    lengths: dict[str, Any] = {"first_s": [2.0, 0.1], "again_s": [0.1, 0.1]}
    lengths |= {
        "implementation": "triton",
        "kind": "ours",
        "kernels_compiled": 7,
        "graphs_compiled": 0,
    }
    result = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "changed": False,
        "sources": "f" * 64,
        "versions": {"torch": "2.13.0"},
        "hardware": {"gpu": "A GPU", "cpu": "a CPU", "threads": 2},
        "roofs": {"copy_bytes_per_s": 4e12, "gemm_flops_per_s": 7.5e14, "dtype": "bfloat16"},
        "quick": False,
        "right": False,
        "finished": True,
        "command": "kernels",
        "parts": {
            "tests": [{"op": "tests", "right": True, "tests": 12, "left_out_files": ["test_x.py"]}],
            "transcoder": [*rows, failed],
            "lengths": [lengths],
        },
        "bounds": bounds({"transcoder": rows}, "H200"),
        "left_out": {"sweep": "no time left", "peer fla-core": "not installed"},
        "failed": {"block": "ValueError: no such shape"},
    }
    (tmp_path / "a-gpu.json").write_text(json.dumps(result))
    return tmp_path


def test_the_page_shows_machine_bounds_and_every_row(results: Path) -> None:
    assert report.main(["--results", str(results), "--no-plots"]) == 0
    page = (results / "README.md").read_text()
    assert "## A GPU: kernels" in page
    assert "commit 0123456789ab, sources ffffffffffff; torch 2.13.0." in page
    assert "copy 4 TB/s, products in bfloat16 750 TFLOP/s" in page
    assert "Checks: tests: right (12), without test_x.py." in page
    assert "| L0 1: time over the encoder GEMM's (triton) | ≤ 1.45 | 1.5 | **no** |" in page
    assert "| T=7500 d=3584 F=8192 L0=1 | triton | 3000 | 30 | 3 | 50% | 3.33 |" in page
    assert "L0=100 | triton (not exact) | out: too far |" in page
    assert "| triton | 2.1 | 0.2 | 7 | 0 |" in page
    assert "Left out: sweep: no time left." in page
    assert "Left out: peer fla-core: not installed." in page
    assert "**A check failed in this run; the figures are not valid.**" in page
    assert "did not finish" not in page
    assert "block: ValueError: no such shape." in page


def test_an_unfinished_run_is_marked(results: Path) -> None:
    path = results / "a-gpu.json"
    stopped = json.loads(path.read_text()) | {"right": True, "finished": False}
    path.write_text(json.dumps(stopped))
    assert report.main(["--results", str(results), "--no-plots"]) == 0
    page = (results / "README.md").read_text()
    assert "The run did not finish" in page
    assert "A check failed" not in page


def test_times_of_kernels_have_a_table(results: Path) -> None:
    path = results / "a-gpu.json"
    result = json.loads(path.read_text())
    kernel = {"name": "sum_by_token", "calls": 2, "us": 101.25}
    result["parts"]["transcoder"][3]["kernels"] = [kernel]
    path.write_text(json.dumps(result))
    assert report.main(["--results", str(results), "--no-plots"]) == 0
    page = (results / "README.md").read_text()
    assert "| T=7500 d=3584 F=8192 L0=1 | triton | sum_by_token | 2 | 101.2 |" in page


def test_a_step_without_time_shows_the_reason(results: Path) -> None:
    path = results / "a-gpu.json"
    row = {"implementation": "ours, none", "kind": "ours", "shape": {"T": 7500}, "right": True}
    parts = {"step": [row | {"skipped": "planned at 147 GB"}, row | {"error": "out of memory"}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parts": parts}))
    assert report.main(["--results", str(results), "--no-plots"]) == 0
    page = (results / "README.md").read_text()
    assert "| 7500 | ours, none | planned at 147 GB |" in page
    assert "| 7500 | ours, none | out of memory |" in page


def test_plots_show_time_ratio_and_lengths(results: Path) -> None:
    pytest.importorskip("matplotlib", reason="extra bench")
    assert report.main(["--results", str(results)]) == 0
    names = {path.name for path in results.glob("*.svg")}
    assert names == {"a-gpu-transcoder.svg", "a-gpu-ratio.svg", "a-gpu-lengths.svg"}
    page = (results / "README.md").read_text()
    assert all(f"({name})" in page for name in names)
    before = {name: (results / name).read_bytes() for name in names}
    assert report.main(["--results", str(results)]) == 0
    assert before == {name: (results / name).read_bytes() for name in names}


def test_an_empty_folder_gives_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "run python benchmarks/gpu.py kernels first" in capsys.readouterr().out
