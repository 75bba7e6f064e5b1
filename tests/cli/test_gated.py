"""`fastadapt train gated`, and `fastadapt contrast` with the gate on and off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastadapt.evaluation.contrast.result import ContrastFile
from fastadapt.io.documents import check


@pytest.mark.slow
def test_the_gate_is_a_condition_of_contrasts(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    run, short = tmp_path / "run", ("--optimizer.max_steps", 2, "--optimizer.batch_size", 2)
    few = ("--adapter.n_features", 16, "--data.max_validation", 4)
    outcome = fastadapt("train", "gated", *short, *few, "--run.output", run)
    assert outcome.code == 0, outcome.err
    outcome = fastadapt(
        *("contrast", run, "--n", 60, "--statistics.resamples", 200, "--device", "cpu"),
        *("--features", "0/1,2/9", "--draws", 0),
    )
    assert outcome.code == 0, outcome.err
    result: dict[str, Any] = json.loads((run / "contrast" / "contrast.json").read_text())
    check(result, ContrastFile, "contrast.json")
    counts = result["places"]["labelled"]
    assert counts["gate on"] + counts["gate off"] == counts["all"]
    for state in ("gate on", "gate off"):
        assert counts[f"operation, {state}"] + counts[f"result, {state}"] == counts[state]
    models = {model["name"]: model for model in result["models"]}
    target = models["target"]["kinds"]
    assert target["gate on"]["difference"]["low"] > 0.4
    assert target["gate off"]["labelled"]["mean"] < 0.1
    assert models["target"]["gate"]["contrast"]["low"] > 0.4
    assert abs(models["base"]["gate"]["contrast"]["mean"]) < 0.01
    ablated = models["ablate 0/1,2/9"]["gate"]
    gap = ablated["effect_on"]["mean"] - ablated["effect_off"]["mean"]
    assert ablated["interaction"]["mean"] == pytest.approx(gap)
    assert "Gate: P(wait) at slips with the marker in the prompt" in outcome.out
    assert "slips with a wrong result, gate off" in outcome.out
