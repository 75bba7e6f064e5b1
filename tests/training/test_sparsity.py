"""λ follows its formula step by step, survives a resumption to the bit, and reaches a target L0."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from same_run import assert_same_run, into, records, stop_after

from fastadapt.errors import UserError
from fastadapt.objective import ObjectiveConfig
from fastadapt.training import loop, trainer
from fastadapt.training.config import TrainConfig
from fastadapt.training.optimizer import OptimizerConfig, learning_rate
from fastadapt.training.run_dir import read_records
from fastadapt.training.sparsity import SparsityWeight
from fastadapt.training.trainer import train

STEERED = {"objective.l0": 3.0, "objective.sparsity": 1e-2}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"]


def test_a_run_without_target_and_ramp_has_the_configured_sparsity(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control calls the objective as before λ was an argument: all bits are equal."""
    train(into(tiny_config(), tmp_path / "new"))
    real, given = loop.objective, []

    def objective(*arguments: Any, sparsity: float, **options: Any) -> Any:
        given.append(sparsity)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "objective", objective)
    train(into(tiny_config(), tmp_path / "before"))
    assert_same_run(tmp_path / "new", tmp_path / "before")
    assert given == [1e-3] * 12
    assert not any("sparsity_weight" in record for record in records(tmp_path / "new"))


def test_a_ramp_rises_in_equal_parts(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Each step's penalty has that λ: without it, the recorded term is that of λ = 1."""
    ramp = {"objective.sparsity_ramp": 0.5, "objective.sparsity": 0.7}
    train(tiny_config(**ramp))
    weights = [record["sparsity_weight"] for record in steps_of(tmp_path / "run")]
    assert weights == [0.7 * n / 7 for n in range(1, 7)] + [0.7] * 6
    evals = [r for r in records(tmp_path / "run") if r["kind"] == "eval"]
    assert [r["sparsity_weight"] for r in evals] == [0.7 / 7, 0.7 * 6 / 7, 0.7, 0.7]


def by_formula(
    l0s: list[float], tokens: list[int], config: ObjectiveConfig, optimizer: OptimizerConfig
) -> list[float]:
    """Return λ of each step, written from the formula with sums over all steps."""
    assert config.l0 is not None
    n = len(l0s)
    rates = [learning_rate(step, n, optimizer) for step in range(n)]
    decay = 1 - 1 / max(1, 0.02 * n)
    weights, errors = [], []
    for t in range(n):
        share = sum(rates[:t]) / sum(rates)
        path = config.l0 * 10 ** ((1 - share) ** 1.5) + 10 * l0s[0] * math.exp(-20 * share)
        recent = [decay ** (t - 1 - i) * tokens[i] for i in range(t)]
        active = sum(w * l0 for w, l0 in zip(recent, l0s, strict=False))
        error = math.log(active / sum(recent) / path) if t and active else -1.0 * (t > 0)
        errors.append(rates[t] / sum(rates) * min(1.0, max(-1.0, error)))
        exponent = 2 * min(1.0, max(-1.0, error)) + 10 * sum(errors)
        weights.append(config.sparsity * math.exp(exponent))
    return weights


def test_steering_follows_the_formula() -> None:
    """The made-up course of L0 has every case: both bounds, no error, and no active feature."""
    n = 200
    config = ObjectiveConfig(l0=4.0, sparsity=0.02)
    optimizer = OptimizerConfig(lr=3e-3, warmup=0.1)
    l0s = [128.0] * 40 + [128 * math.exp(-0.05 * t) for t in range(130)] + [0.0] * 30
    tokens = [50 + 7 * (t % 5) for t in range(n)]
    steered = SparsityWeight(config, optimizer, n)
    weights = []
    for step in range(n):
        weights.append(steered.value(step))
        steered.applied(step, [l0s[step] - 0.5, l0s[step] + 0.5], tokens[step])
    assert weights == pytest.approx(by_formula(l0s, tokens, config, optimizer), rel=1e-9)
    assert weights[0] == 0.02
    assert max(weights) > 10 * 0.02 > 0.002 > min(weights)


@pytest.mark.parametrize("steps", [9, 1000, 6250, 50_000])
def test_the_weight_after_the_last_step_follows_the_formula(steps: int) -> None:
    """For these numbers of steps, the rounded shares of all steps sum to more than 1."""
    steered = SparsityWeight(ObjectiveConfig(l0=4.0, sparsity=0.02), OptimizerConfig(), steps)
    steered.applied(0, [6.0], 50)
    error = math.log(6 / (4 + 60 * math.exp(-20)))
    assert steered.value(steps) == pytest.approx(0.02 * math.exp(2 * error), rel=1e-9)


def test_without_gains_the_sparsity_stays() -> None:
    config = ObjectiveConfig(l0=4.0, sparsity=0.02)
    steered = SparsityWeight(config, OptimizerConfig(), 10, proportional=0.0, integral=0.0)
    for step in range(10):
        assert steered.value(step) == 0.02
        steered.applied(step, [128.0], 50)


def test_a_steered_run_applies_and_records_the_formula(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(**STEERED)
    summary = train(config)
    taken = steps_of(tmp_path / "run")
    totals = [record["tokens"] for record in taken]
    tokens = [after - before for before, after in zip([0, *totals], totals, strict=False)]
    l0s = [sum(record["l0_per_layer"]) / 2 for record in taken]
    weights = [record["sparsity_weight"] for record in taken]
    expected = by_formula(l0s, tokens, config.objective, config.optimizer)
    assert weights == pytest.approx(expected, rel=1e-9)
    assert len(set(weights)) == len(weights)
    assert summary["sparsity_weight"] == records(tmp_path / "run")[-1].get("sparsity_weight")


@pytest.mark.parametrize("changes", [STEERED, {"objective.sparsity_ramp": 0.8}])
def test_stopped_and_resumed_with_a_varying_sparsity(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, changes: dict[str, float]
) -> None:
    config = tiny_config(**changes)
    train(into(config, tmp_path / "whole"))
    stop, again = Event(), into(config, tmp_path / "again")
    assert train(again, stop=stop, sinks=[stop_after(stop, 5)])["interrupted"]
    train(again, resume=True)
    ours = [r for r in records(tmp_path / "again") if (r["kind"], r["step"]) != ("checkpoint", 5)]
    assert ours == records(tmp_path / "whole")


def test_another_target_or_none_of_its_state_is_refused_on_resumption(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Event()
    train(tiny_config(**STEERED), stop=stop, sinks=[stop_after(stop, 4)])
    with pytest.raises(UserError, match=r"objective\.l0"):
        train(tiny_config(**{**STEERED, "objective.l0": 4.0}), resume=True)
    find = trainer.load_latest

    def without(folder: Path) -> tuple[Any, Any]:
        checkpoint, passed = find(folder)
        assert checkpoint is not None
        assert checkpoint.scalars.pop("steering")["first"] > 0
        return checkpoint, passed

    monkeypatch.setattr(trainer, "load_latest", without)
    with pytest.raises(
        UserError, match=r"state\.json: steering: expected the state of objec.*none"
    ):
        train(tiny_config(**STEERED), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.l0": 0.0}, r"objective\.l0 must be a number of features above 0, or null"),
        ({"objective.l0": math.inf}, r"objective\.l0 must be a number"),
        ({"objective.l0": 48.0}, r"fewer than the 48 features of a layer .*got 48"),
        ({"objective.sparsity": 0.0}, r"objective\.l0: expected null with objective\.sparsity 0"),
        ({"objective.sparsity_ramp": 0.1}, r"leave the ramp out"),
        ({"adapter.activation": "topk", "adapter.k": 3}, r"whose L0 is adapter\.k, 3, got 3"),
        ({"adapter.activation": "batch_topk", "adapter.k": 2.5}, r"give one of the two"),
        (
            {"run.trains": "mlp", "adapter.n_features": None, "objective.sparsity": 0.0},
            r"objective\.l0: expected null, since run\.trains 'mlp' has no features, got 3",
        ),
    ],
)
def test_settings_that_exclude_a_target(
    tiny_config: Callable[..., TrainConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**{**STEERED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.sparsity_ramp": 1.5}, r"a share of the steps, in \[0, 1\], got 1\.5"),
        ({"objective.sparsity_ramp": math.nan}, r"in \[0, 1\], got nan"),
        (
            {"objective.sparsity_ramp": 0.1, "objective.sparsity": 0.0},
            r"nothing to rise to, got 0\.1",
        ),
    ],
)
def test_impossible_ramps(
    tiny_config: Callable[..., TrainConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)
