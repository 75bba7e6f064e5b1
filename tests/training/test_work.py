"""FLOPs of a step follow the formulas, are linear in depth, and are below the naive step's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from transformers import Qwen2Config

from benchmarks.naive_step import NaiveStep
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.data.batches import Batch
from fastadapt.models.pair import DTYPES, ModelPair, PairConfig
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.planning.flops import (
    Setup,
    count,
    count_of,
    flops_per_step,
)

D, INNER, F, V, T, L = 3584, 18_944, 8192, 152_064, 7500, 28


def paper(**changes: Any) -> Setup:
    """Return a setup with the shapes of the 7B pair."""
    config = Qwen2Config(
        hidden_size=D,
        intermediate_size=INNER,
        num_hidden_layers=L,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=V,
        tie_word_embeddings=False,
    )
    objective = ObjectiveConfig(first_cutoff=0, **changes)
    pair = PairConfig("target", "base", dtype="bfloat16")
    return Setup(config, pair, AdapterConfig(F), objective, sequences=1, tokens=T)


def naive_count(setup: Setup, n_layers: int, cutoff: int) -> float:
    def step(pair: ModelPair, batch: Batch) -> None:
        assert isinstance(setup.trained, AdapterConfig)
        adapters = [
            TranscoderAdapter(D, setup.trained, dtype=DTYPES[setup.pair.dtype])
            for _ in pair.base_mlps
        ]
        NaiveStep(pair, adapters)(batch.input_ids, cutoff, setup.objective)["loss"].backward()

    return count_of(setup, n_layers, step)


def mean_over_cutoffs(count_at: Callable[[int, int], float], n_layers: int, first: int) -> float:
    """Return the mean of ``count_at(n_layers, k)`` over k in ``first..n_layers``.

    ``count_at`` is called for depths 2 and 3 only. Between its ends it is linear in the number of
    layers up to the cutoff and in the number behind it.
    """
    two, three = count_at(2, 0), count_at(3, 0)
    ends = {0: two + (n_layers - 2) * (three - two)}
    two, three = count_at(2, 2), count_at(3, 3)
    ends[n_layers] = two + (n_layers - 2) * (three - two)
    one_each = count_at(2, 1)
    before, behind = count_at(3, 2) - one_each, count_at(3, 1) - one_each
    constant = one_each - before - behind
    cutoffs = range(first, n_layers + 1)
    each = [ends.get(k, k * before + (n_layers - k) * behind + constant) for k in cutoffs]
    return sum(each) / len(each)


def test_a_layer_by_hand() -> None:
    """Count the products of a layer by their shapes, without recompute and bridges."""
    setup = paper(checkpoint="none", bridge=0)
    layer = count(setup, 3, 0, F) - count(setup, 2, 0, F)
    attention = 2 * T * D * (D + 2 * 512 + D)
    mlp = 3 * 2 * T * D * INNER
    adapter = 2 * 2 * T * D * F
    scores = 2 * 2 * T * T * D / 2
    target = attention + mlp + scores
    replacement = attention + mlp + adapter + scores
    backward = attention + mlp + 2 * adapter + 2.5 * scores  # frozen weights have no gradient
    assert layer == pytest.approx(target + replacement + backward, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "mlp", "attention", "full"])
def test_depth_and_cutoff_are_linear(policy: str) -> None:
    setup = dataclasses.replace(paper(checkpoint=policy), tokens=300)
    cutoffs = [count(setup, 4, k, 10.0) for k in range(5)]
    assert flops_per_step(setup, 4, 10.0) == pytest.approx(sum(cutoffs) / 5, rel=1e-12)


@pytest.mark.slow
def test_policies_of_layers_are_summed() -> None:
    setup = dataclasses.replace(paper(), tokens=300)
    policies = ("none", "mlp", "full", "attention")

    def graded(pair: ModelPair, batch: Batch, cutoff: int) -> None:
        model = ReplacementModel.create(pair, setup.trained)
        out = objective(model, batch, cutoff, setup.objective, [10.0] * 4, policies)
        out.loss.backward()

    each = [count_of(setup, 4, partial(graded, cutoff=k)) for k in range(5)]
    summed = flops_per_step(setup, 4, 10.0, lambda _: policies)
    assert summed == pytest.approx(sum(each) / 5, rel=1e-12)


@pytest.mark.slow
def test_without_a_bridge_every_cutoff_takes_the_same_operations() -> None:
    setup = dataclasses.replace(paper(checkpoint="attention", bridge=0), tokens=300)
    assert flops_per_step(setup, 4, 10.0) == pytest.approx(count(setup, 4, 2, 10.0), rel=1e-12)


@pytest.mark.slow
def test_the_plain_step_is_linear_too() -> None:
    setup = dataclasses.replace(paper(), tokens=300)
    each = [naive_count(setup, 4, k) for k in range(5)]
    mean = mean_over_cutoffs(lambda depth, k: naive_count(setup, depth, k), 4, 0)
    assert mean == pytest.approx(sum(each) / 5, rel=1e-12)


@pytest.mark.slow
def test_what_is_recomputed() -> None:
    """Down is never recomputed, dense adapters always, the others as the policies say."""
    counts = {
        (policy, l0): count(paper(checkpoint=policy, bridge=0), 3, 0, l0)
        - count(paper(checkpoint=policy, bridge=0), 2, 0, l0)
        for policy in POLICIES
        for l0 in (10.0, F)
    }
    scores = 2 * 2 * T * T * D / 2
    attention = 2 * T * D * (D + 2 * 512 + D)
    gate_and_up = 2 * 2 * T * D * INNER
    encoder_and_decoder = 2 * 2 * T * D * F
    products = attention + gate_and_up
    for l0, more in ((10.0, 0), (F, encoder_and_decoder)):
        none = counts["none", l0]
        saved = counts["attention", l0] - counts["mlp", l0]
        assert saved == pytest.approx(gate_and_up, rel=1e-3)
        assert counts["attention", l0] - none == pytest.approx(products + more, rel=1e-3)
        assert counts["full", l0] - none == pytest.approx(products + more + scores, rel=1e-3)


@pytest.mark.slow
def test_the_papers_step_takes_fewer_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """Compare our step at L0 10 with the naive step, which recomputes nothing."""
    ours = {p: flops_per_step(paper(checkpoint=p), L, 10.0) for p in POLICIES}
    first = flops_per_step(paper(checkpoint="full"), L, F)
    plain = mean_over_cutoffs(lambda depth, k: naive_count(paper(), depth, k), L, 0)
    with capsys.disabled():
        policies = ", ".join(f"{policy} {n / 1e12:.0f}" for policy, n in ours.items())
        print(
            f" TFLOP a step, 7B pair, T=7,500, mean over cutoffs: ours at L0 10, by checkpoint: "
            f"{policies}; dense adapters, full: {first / 1e12:.0f}; plain: {plain / 1e12:.0f} "
        )
    assert ours["full"] <= 900e12
    assert ours["none"] < ours["mlp"] < ours["attention"] < ours["full"] < first < plain
    assert plain > 1.6 * ours["full"]
