"""The plan against the tensors alive in a step of full depth, on fake tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from transformers import Gemma2Config, Qwen2Config

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.kernels.transcoder.codes import dense_share
from fastadapt.models.pair import DTYPES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training.config import TrainConfig, from_dict
from fastadapt.training.planning.flops import Setup, fake_pair
from fastadapt.training.planning.live_bytes import LiveBytes
from fastadapt.training.planning.memory import StepMemory, step_memory

LAYERS, TOKENS = 10, 10_000


QWEN = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=LAYERS,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
    tie_word_embeddings=False,
)
GEMMA = Gemma2Config(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=256_000,
)


def run_config(policy: str, attention: str = "auto") -> TrainConfig:
    pair = {"target": "target", "base": "base", "dtype": "bfloat16", "attention": attention}
    return from_dict(
        {
            "pair": pair,
            "adapter": {"n_features": 8192},
            "objective": {"checkpoint": policy},
            "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
            "optimizer": {"masters": False},
            "run": {"output": "out"},
        }
    )


def test_the_tracker_counts_living_tensors() -> None:
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a.view(10, 100) * 2
        assert live.alive == 8000
        del a
        assert (live.alive, live.peak) == (4000, 8000)
        assert b.sum() == 2000


def test_the_tracker_adds_the_workspace_of_an_op() -> None:
    with LiveBytes({torch.ops.aten.mul.Tensor: lambda a, b: a.nbytes}) as live:
        a = torch.ones(1000)
        b = a * a
    assert (live.alive, live.peak) == (8000, 12_000)
    assert live.workspace == {torch.ops.aten.mul.Tensor: 4000}
    assert live.alive_of(torch.ops.aten.mul.Tensor) == b.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["attention", "none", "mlp", "full"])
def test_the_plan_matches_a_step(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At the 7B pair's width, 10,000 tokens: at most 2% above, beside what ops allocate inside."""
    config = run_config(policy)
    memory = step_memory(config, QWEN, TOKENS, "cuda")
    by_density = [measure(config, QWEN, memory.parts, TOKENS, dense) for dense in (False, True)]
    forward, backward = (max(each) for each in zip(*by_density, strict=True))
    planned_forward, planned_backward = peaks(memory)
    with capsys.disabled():
        print(
            f" {policy}: forward {forward / 1e9:.2f} of {planned_forward / 1e9:.2f} GB planned, "
            f"backward {backward / 1e9:.2f} of {planned_backward / 1e9:.2f} "
        )
    assert forward <= planned_forward <= 1.02 * forward + memory.parts["logits of a chunk"]
    assert backward <= planned_backward <= 1.02 * backward


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    ("model", "tokens"),
    [pytest.param(GEMMA, 4000, id="gemma2"), pytest.param(QWEN, 3000, id="qwen2")],
)
def test_attention_that_makes_all_scores_is_planned(model: Any, tokens: int, policy: str) -> None:
    """Within a tenth."""
    config = run_config(policy, attention="eager")
    memory = step_memory(config, model, tokens, "cuda")
    logits = memory.parts["logits of a chunk"]
    for live, planned in zip(
        measure(config, model, memory.parts, tokens, False), peaks(memory), strict=True
    ):
        assert live <= planned <= 1.1 * live + logits


def test_counts_of_features_of_later_layers_are_planned() -> None:
    """They live until the step ends, while what their layers saved is freed."""
    config = run_config("full", attention="eager")
    memory = step_memory(config, QWEN, 2000, "cuda")
    _, backward = measure(config, QWEN, memory.parts, 2000, False)
    assert backward <= peaks(memory)[1] <= backward + 8192 * 8  # of one layer


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize(
    "bridge", [0.0, pytest.param(1.0, marks=pytest.mark.slow)], ids=["output", "bridged"]
)
@pytest.mark.parametrize("kind", ["mlp", pytest.param("norms", marks=pytest.mark.slow)])
def test_the_plan_of_a_baseline_matches_a_step(
    kind: Literal["mlp", "norms"], bridge: float, policy: str
) -> None:
    """Never below the bytes alive, and at most a tenth above, beside logits."""
    config = run_config(policy)
    weights = dataclasses.replace(config.objective, sparsity=0.0, nmse=bridge, bridge=bridge)
    run = dataclasses.replace(config.run, trains=kind)
    config = dataclasses.replace(config, adapter=AdapterConfig(), objective=weights, run=run)
    memory = step_memory(config, QWEN, TOKENS, "cuda")
    logits = memory.parts["logits of a chunk"]
    for live, planned in zip(
        measure(config, QWEN, memory.parts, TOKENS, False), peaks(memory), strict=True
    ):
        assert live <= planned <= 1.1 * live + logits


def peaks(memory: StepMemory) -> tuple[int, int]:
    """Planned bytes in the forward and in the backward pass, without moments."""
    phases, moments = memory.phases, memory.parts["moments"]
    return max(phases["forward"], phases["head"]) - moments, phases["backward"] - moments


def measure(
    config: TrainConfig,
    model_config: Any,
    parts: Mapping[str, int],
    tokens: int,
    dense: bool,
    cutoff: int = 1,
    policies: Sequence[str] | None = None,
) -> tuple[int, int]:
    """The most bytes alive in a step's forward and in its backward pass, without moments."""
    setup = Setup(model_config, config.pair, config.trained, config.objective, 1, tokens)
    codes = None
    if sparse := config.n_features > 0:
        share = dense_share(torch.bfloat16, "cuda")
        codes = [8192.0 if dense else share * 8192 * 0.999] * LAYERS
    with fake_pair(setup, LAYERS) as pair:
        model = ReplacementModel.create(pair, config.trained)
        model.fused.plan_for("cuda", DTYPES[config.pair.dtype])
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with LiveBytes() as live:
            for parameter in model.parameters():
                live.see(parameter.data)
            live.peak = weights = live.alive
            out = objective(model, Batch(ids, None, ids), cutoff, config.objective, codes, policies)
            forward, live.peak = live.peak, live.alive
            out.loss.backward()
            backward, after = live.peak, live.alive
    fixed = ("frozen target", "frozen base MLPs", "adapters")
    assert weights == sum(parts[name] for name in fixed)
    counts = LAYERS * 8192 * 8 * sparse  # of features, in the step's statistics
    gradients = sum(p.numel() for p in model.adapters.parameters()) * 2 + counts
    # Norms have few weights, so the step's statistics are most of the bytes after it.
    if config.run.trains == "norms":
        assert gradients < after - weights < gradients + 8 * 2 * tokens
        return forward, backward
    assert after - weights == pytest.approx(gradients, rel=1e-4)
    return forward, backward


@pytest.mark.quick("1")
@pytest.mark.parametrize("n_layers", [1, 2, 7])
def test_any_depth_is_planned(n_layers: int) -> None:
    """Models of fewer layers than the measured ones, and of more."""
    config = run_config("attention")
    model = {**QWEN.to_dict(), "num_hidden_layers": n_layers, "layer_types": None}
    memory = step_memory(config, Qwen2Config.from_dict(model), 500, "cuda")
    fixed = sum(memory.parts[n] for n in ("frozen target", "frozen base MLPs", "adapters"))
    assert memory.phases["update"] == fixed + memory.parts["moments"] + memory.parts["gradients"]
    assert memory.parts["gradients"] == memory.adapter_bytes == 2 * memory.parameters


@pytest.mark.slow
def test_codes_need_more_with_more_features() -> None:
    config = run_config("full")
    few, many = (
        step_memory(
            dataclasses.replace(config, adapter=AdapterConfig(features)),
            Qwen2Config(num_hidden_layers=3, hidden_size=64),
            500,
            "cuda",
        ).parts["codes"]
        for features in (4096, 8192)
    )
    assert few < many
    stored = step_memory(run_config("none"), QWEN, 500, "cuda").parts["codes"]
    assert stored >= 19 * 500 * 8192 * 2  # dense activations of 10 layers, two streams behind 1
