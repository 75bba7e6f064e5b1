"""The predicted time of a step comes from a share that was measured here, or says that it did not."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastadapt.batch import Batch
from fastadapt.cli.train import parse_train
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training.planning import estimate
from fastadapt.training.planning.devices import MEASURED, Device
from fastadapt.training.planning.flops import count, random_pair

CPU = Device("this CPU", "cpu", 16 * 2**30, 5e10, MEASURED)


def planned(*argv: str, device: Device = CPU) -> tuple[Any, Any]:
    config, _ = parse_train(list(argv))
    return config, replace(estimate.plan(config), device=device)


def test_hours_are_those_of_the_measured_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measured_share", lambda *_: 0.25)
    config, plan = planned("organism")
    predicted = estimate.predict(config, plan)
    assert predicted.share == 0.25
    assert predicted.step_s == pytest.approx(predicted.flops_per_step / (0.25 * 5e10))
    assert predicted.hours == pytest.approx(plan.steps * predicted.step_s / 3600)
    elsewhere = replace(CPU, source="data sheet, an upper bound")
    bound = estimate.predict(config, replace(plan, device=elsewhere))
    assert bound.share is None
    assert bound.hours == pytest.approx(predicted.hours / 4)


def test_the_share_is_the_time_of_a_real_step() -> None:
    """The step that is timed, run once more here: the two rates differ by noise only."""
    config, plan = planned("organism", "--pair.device", "cpu")
    captured: list[Any] = []
    measure = estimate.measured_share

    def capture(setup: Any, device: Device) -> float | None:
        captured.append(setup)
        return measure(setup, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "measured_share", capture)
        predicted = estimate.predict(config, plan)
    (setup,) = captured
    assert predicted.share is not None
    model = ReplacementModel.create(random_pair(setup, 2), setup.trained)
    tokens = min(setup.tokens, 512)
    ids = torch.zeros(max(1, min(setup.sequences, 512 // tokens)), tokens, dtype=torch.int64)
    settings = replace(setup.objective, checkpoint="none")
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        objective(model, Batch(ids, None, ids), 1, settings).loss.backward()
        seconds.append(time.perf_counter() - began)
    setup = replace(setup, objective=settings, sequences=len(ids))
    rate = count(setup, 2, 1, float(model.n_features)) / min(seconds) / CPU.flops_per_s
    assert 0.2 < predicted.share / rate < 5


def test_a_model_too_large_to_time_has_no_share() -> None:
    config, plan = planned("r1-distill-qwen-7b", "--pair.device", "cpu")
    assert estimate.predict(config, plan).share is None
