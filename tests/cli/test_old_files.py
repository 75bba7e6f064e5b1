"""Runs, checkpoints, adapters and stores that an earlier commit wrote are resumed and read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.features.store.store import Store
from fastadapt.models.trained_files import load_adapters

OLD = Path(__file__).parent / "old_files"
#: Fields of a record that depend on the machine's speed.
TIMES = {"wall_s", "tokens_per_s"}


def records(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the records of ``metrics.jsonl`` by kind and step, without times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    return {
        (record["kind"], record["step"]): {k: v for k, v in record.items() if k not in TIMES}
        for record in parsed
    }


def is_close(value: Any, expected: Any) -> bool:
    """Compare recorded values; another machine's sums differ in their last bits."""
    if isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=1e-3, abs_tol=1e-6)
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(is_close, value, expected))
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            is_close(value[key], expected[key]) for key in expected
        )
    return bool(value == expected)


def test_a_killed_run_resumes_to_the_recorded_metrics(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    shutil.copytree(OLD / "killed", run)
    outcome = fastadapt("train", run / "config.yaml", "--run.output", run, "--resume")
    assert outcome.code == 0, outcome.err
    resumed, recorded = records(run), records(OLD / "finished")
    assert resumed.pop(("resume", 4))
    assert resumed.keys() == recorded.keys()
    for key, record in recorded.items():
        assert is_close(resumed[key], record), key
    adapters, expected = (load_adapters(r / "adapter")[0] for r in (run, OLD / "finished"))
    for adapter, other in zip(adapters, expected, strict=True):
        for name, weight in adapter.state_dict().items():
            torch.testing.assert_close(weight, other.state_dict()[name], rtol=1e-2, atol=1e-4)


def test_a_finished_run_is_read(fastadapt: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "finished", run)
    assert fastadapt("features", "check", run).code == 0
    store = Store.open(run)
    assert store.read("features").num_rows == 4 * 16
    assert sum(store.read("features")["count"].to_pylist()) > 0
    outcome = fastadapt("export", run, "--output", tmp_path / "served")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", ["finished", "killed"])
def test_old_files_hold_no_path_of_the_machine(name: str) -> None:
    for path in (OLD / name).rglob("*.json*"):
        assert "/tmp" not in path.read_text(encoding="utf-8")
