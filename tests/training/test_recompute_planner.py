"""The policies of each layer and batch: they fit, recompute little, and change no bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastadapt.cli.train import find_config, read_yaml
from fastadapt.distributed.ranks import Ranks
from fastadapt.models.recompute import POLICIES
from fastadapt.training import loop, trainer
from fastadapt.training.config import TrainConfig, from_dict
from fastadapt.training.loop import TrainingRun
from fastadapt.training.planning import recompute
from fastadapt.training.planning.devices import DATA_SHEETS, Device, planned_device
from fastadapt.training.planning.estimate import gb
from fastadapt.training.planning.flops import Setup, flops_per_step
from fastadapt.training.planning.memory import LayerBytes, MeasuredStep
from fastadapt.training.planning.recompute import RecomputePlanner
from fastadapt.training.trainer import train
from tests.training.test_memory import QWEN, measure, run_config

LAYERS = 6
#: Saved bytes per token of a layer with one stream, by policy.
SAVED = {"none": 30, "mlp": 15, "attention": 3, "full": 2}


def device(memory: float) -> Device:
    """Return a device whose usable memory is ``memory``."""
    return Device("a test's device", "cuda", int(memory) + 4_000_000_000, 1e12, "assumed")


def synthetic(_: Any, __: Any, tokens: int, ___: str, policy: str) -> list[MeasuredStep]:
    """Return measurements without weights; dense layers save 3 bytes more per token and stream."""

    def step(extra: int) -> MeasuredStep:
        def layer(streams: int) -> LayerBytes:
            saved = streams * tokens * (SAVED[policy] + extra)
            again = streams * tokens * (40 - SAVED[policy])
            return LayerBytes(saved, 0, saved + tokens, again)

        layers = {"first": layer(1), "before": layer(1), "fork": layer(3), "behind": layer(3)}
        return MeasuredStep(0, 0, 0, (0, 0, 0, 0), 0, 0, 10 * tokens, tokens, layers, "behind")  # type: ignore[arg-type]

    return [step(3), step(0)]


def planner(memory: float, monkeypatch: pytest.MonkeyPatch) -> RecomputePlanner:
    monkeypatch.setattr(recompute, "measure", synthetic)
    target = SimpleNamespace(num_hidden_layers=LAYERS)
    return RecomputePlanner(run_config("auto"), target, 1000, device(memory))


def work(policies: tuple[str, ...]) -> int:
    """Return a number that grows with recomputation."""
    return sum(POLICIES.index(policy) for policy in policies)


@pytest.mark.parametrize("memory", [200_000, 300_000, 400_000])
def test_shorter_batches_and_later_cutoffs_recompute_less(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planner(memory, monkeypatch)
    assert plan.recomputes
    assert plan.fits
    by_length = [plan.policies(tokens, 1) for tokens in (100, 400, 600, 900, 1000)]
    amounts = [work(policies) for policies in by_length]
    assert amounts == sorted(amounts)
    assert by_length[0] == ("none",) * LAYERS
    assert len(set(by_length[-1])) > 1
    amounts = [work(plan.policies(1000, cutoff)) for cutoff in range(1, LAYERS)]
    assert amounts == sorted(amounts, reverse=True)
    for tokens in range(1, 1001, 37):
        for cutoff in range(LAYERS + 1):
            policies = plan.policies(tokens, cutoff)
            assert plan.peak_bytes(tokens, cutoff, policies) <= memory
            assert policies == plan.policies(tokens, cutoff)


def test_every_policy_is_raised_from_the_last_layer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second layer, with one stream, may still fit where a layer of three streams does not.
    policies = planner(300_000, monkeypatch).policies(1000, 1)[1:]
    ranks = [POLICIES.index(policy) for policy in policies]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]


def test_the_least_memory_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(10_000, monkeypatch)
    assert not plan.fits
    assert plan.policies(1000, 1) == ("full",) * LAYERS


def test_layers_that_are_known_to_be_sparse_recompute_less(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(250_000, monkeypatch)
    unknown, sparse, dense = (
        work(plan.policies(1000, 1, codes)) for codes in (None, [1.0] * LAYERS, [8192.0] * LAYERS)
    )
    assert sparse < unknown == dense


@pytest.mark.parametrize(
    ("tokens", "cutoff", "share"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (8000, 4, 0.5),
                (8000, 1, 0.3),
                (8000, 9, 0.7),
                (10_000, 0, 0.5),
                (6000, 10, 0.2),
            ]
        ),
    ],
)
def test_the_plan_of_mixed_policies_matches_a_step(
    tokens: int, cutoff: int, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the 7B pair's width: never below the bytes alive, at most 4% above, beside logits."""
    config, n = run_config("auto"), QWEN.num_hidden_layers
    free = RecomputePlanner(config, QWEN, 10_000, device(1e15))
    least, most = (free.peak_bytes(tokens, cutoff, [p] * n) for p in ("full", "none"))
    plan = RecomputePlanner(config, QWEN, 10_000, device(least + share * (most - least)))
    policies = plan.policies(tokens, cutoff)
    assert len(set(policies)) > 1
    planned = plan.peak_bytes(tokens, cutoff, policies)
    fixed = plan._fixed_memory().weights
    moments = fixed["moments"]
    alive = max(
        max(measure(config, QWEN, fixed, tokens, dense, cutoff, policies))
        for dense in (False, True)
    )
    with capsys.disabled():
        print(f" {policies}: {gb(alive)} of {gb(planned - moments)} planned ")
    logits = plan._measured(tokens, "none")[0].logits
    assert alive <= planned - moments <= 1.04 * alive + logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "masters", "budget"),
    [("h100", False, 700e12), ("h200", False, 640e12), ("h200", True, 640e12)],
)
def test_work_of_the_papers_step(
    gpu: str, masters: bool, budget: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of 7,500 tokens at L0 10, on a run whose longest sequence has 10,000 tokens."""
    from fastadapt.training.planning.estimate import _target

    config = from_dict(read_yaml(find_config("r1-distill-qwen-7b")))
    optimizer = dataclasses.replace(config.optimizer, masters=masters)
    config = dataclasses.replace(config, optimizer=optimizer)
    target = _target(config)
    n, codes = target.num_hidden_layers, [10.0] * target.num_hidden_layers
    plan = RecomputePlanner(config, target, 10_000, planned_device(gpu, "cuda", torch.bfloat16))
    setup = Setup(target, config.pair, config.trained, config.objective, 1, 7500)
    flops = flops_per_step(setup, n, 10.0, lambda cutoff: plan.policies(7500, cutoff, codes))
    with capsys.disabled():
        print(f" {DATA_SHEETS[gpu][0]}, masters {masters}: {flops / 1e12:.0f} TFLOP a step ")
    assert flops <= budget


@pytest.mark.slow
def test_policies_by_batch_change_no_bit(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a device with little memory equals one that recomputes nothing."""
    sizes = {"optimizer.batch_size": 1, "optimizer.max_steps": 6, "run.eval_every": 0}
    little, whole = (
        tiny_config(
            **sizes, **{"run.output": str(tmp_path / name), "objective.checkpoint": checkpoint}
        )
        for name, checkpoint in (("little", "auto"), ("whole", "none"))
    )
    model, feed = trainer.load_model_and_data(little)
    longest = max(feed.train.counts.longest, feed.held_out.counts.longest)
    large = Device("a large CPU", "cpu", 10**12, 1e9, "assumed")
    plan = RecomputePlanner(little, model.model.config, longest, large)
    least, most = (plan.peak_bytes(longest, 1, [p] * 2) for p in ("full", "none"))
    memory = int((least + 0.3 * (most - least)) / 0.9)
    small = Device("a small CPU", "cpu", memory, 1e9, "assumed")
    monkeypatch.setattr(trainer, "this_device", lambda _: small)
    seen: set[tuple[str, ...]] = set()
    real = loop.objective

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.add(kwargs["policies"])
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "objective", watched)
        train(little)
    assert len(seen) > 1
    train(whole)
    for file in ("weights", "exp_avg", "exp_avg_sq"):
        name = f"checkpoints/step-00000006/{file}.safetensors"
        assert (tmp_path / "little" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ranks_take_the_policies_of_their_longest_micro_batch(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(**{"optimizer.accumulation": 4})
    model, feed = trainer.load_model_and_data(config)
    requested: list[tuple[int, int]] = []

    def policies(tokens: int, cutoff: int, _: Any) -> tuple[str, ...]:
        requested.append((tokens, cutoff))
        return ("none", "none")

    plan: Any = SimpleNamespace(policies=policies)
    micro_batches = feed.micro_batches(0)
    widths = feed.widths(micro_batches)
    batches = [feed.batch(feed.train, ids)[0] for ids in micro_batches]
    assert widths == [batch.input_ids.shape[1] for batch in batches]
    for rank in range(2):
        requested.clear()
        run = TrainingRun(config, tmp_path, 0.0, model, feed, Ranks(rank, 2), plan)
        assert len(run._policies(micro_batches, 1, None)) == 2
        assert requested == [(max(widths[:2]), 1), (max(widths[2:]), 1)]
