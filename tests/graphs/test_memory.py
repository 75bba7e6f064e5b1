"""The plan of a graph's memory, against tensors alive in real graphs and in fake ones of 7B."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from organism_runs import make_run
from transformers import Qwen2Config

from fastadapt.adapter.module import AdapterConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.graphs.evidence import EvidenceConfig, account, measure_evidence
from fastadapt.graphs.graph import GraphConfig, grow
from fastadapt.graphs.linear.backward import FINAL, walk
from fastadapt.graphs.linear.heads import head_loadings
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.memory import GraphSetup, fake_trace, graph_memory
from fastadapt.graphs.targets import contrast
from fastadapt.models.pair import PairConfig
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig
from fastadapt.training.planning.flops import Setup, fake_pair
from fastadapt.training.planning.live_bytes import LiveBytes

LENGTHS = (100, 200, 300, 400)
GRAPH, EVIDENCE = GraphConfig(nodes=3, top=8, rows=2), EvidenceConfig(ablations=3, copies=2)
QWEN_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = make_run(tmp_path_factory.mktemp("memory") / "run")
    return ModelSet.open([run], device="cpu").model


def counted(model: ReplacementModel, n: int, stream: Any) -> tuple[int, float]:
    """Return the most bytes alive while a graph of n tokens is made, and its L0."""
    ids = torch.arange(n) % 200 + 5
    live = LiveBytes()
    with live:
        for parameter in model.parameters():
            live.see(parameter)
        trace = record(model, ids, stream=stream, rows=GRAPH.rows)
        graph = grow(trace, [contrast(trace, 7, 11, n - 1)], GRAPH)
        head_loadings(trace, graph.leaves, graph.rows[0].target, [0, 1])
        measure_evidence(trace, graph.leaves, graph.rows[0].target, EVIDENCE)
    return live.peak, graph.leaves.n_features / n / model.n_layers


def growth(peaks: list[int]) -> float:
    """Return the last increment over the first: 1 if memory is linear, 7/3 if it is quadratic."""
    steps = [b - a for a, b in pairwise(peaks)]
    assert min(steps) > 0
    return steps[-1] / steps[0]


@pytest.mark.slow
def test_long_plans_are_linear_unless_attention_is_not(model: ReplacementModel) -> None:
    def peaks(attention: str) -> list[int]:
        pair = PairConfig("target", "base", dtype="float32", attention=attention)
        setup = GraphSetup(model.model.config, pair, AdapterConfig(64), 0, 3.0, config=GRAPH)
        return [graph_memory(replace(setup, tokens=10 * n)).peak_bytes for n in LENGTHS]

    assert growth(peaks("auto")) == pytest.approx(1, abs=0.02)
    assert growth(peaks("eager")) > 1.5  # the control


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_memory_is_linear_and_planned(model: ReplacementModel, stream: Any) -> None:
    measured = [counted(model, n, stream) for n in LENGTHS]
    assert growth([peak for peak, _ in measured]) < 1.2
    for n, (peak, l0) in zip(LENGTHS, measured, strict=True):
        setup = GraphSetup(
            model.model.config,
            model.pair.config,
            AdapterConfig(model.n_features),
            n,
            l0,
            stream,
            GRAPH,
            EVIDENCE,
        )
        plan = graph_memory(setup)
        assert peak <= plan.peak_bytes + plan.host_bytes < 1.5 * peak
        assert plan.without_recompute > plan.phases["edges"]


@pytest.mark.slow
def test_larger_graphs_need_more(model: ReplacementModel) -> None:
    pair = PairConfig("target", "base", dtype="float32")
    none = EvidenceConfig(ablations=0)  # whose copies of the text would be the peak
    setup = GraphSetup(
        model.model.config, pair, AdapterConfig(64), 100, 3.0, config=GRAPH, evidence=none
    )
    plan = graph_memory(setup)
    values = {**model.model.config.to_dict(), "num_hidden_layers": 9, "layer_types": None}
    deeper = Qwen2Config(**values)
    for changed, part in (
        (replace(setup, config=replace(GRAPH, rows=4)), "one block, backward"),
        (replace(setup, l0=6.0), "codes"),
        (replace(setup, adapter=AdapterConfig(640)), "weights"),
        (replace(setup, target=deeper), "states"),
    ):
        other = graph_memory(changed)
        assert other.parts[part] > plan.parts[part]
        assert other.peak_bytes > plan.peak_bytes
    more = graph_memory(replace(setup, config=replace(GRAPH, nodes=30, top=80)))
    assert more.host["stored edges"] > 9 * plan.host["stored edges"]
    assert more.peak_bytes == plan.peak_bytes


def test_the_plan_knows_when_the_targets_mlps_are_not_loaded(
    model: ReplacementModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pair = PairConfig("target", "base", dtype="float32")
    setup = GraphSetup(model.model.config, pair, AdapterConfig(24), 100, 3.0, config=GRAPH)
    plan, without = (graph_memory(replace(setup, target_mlps=loads)) for loads in (True, False))
    run = make_run(tmp_path_factory.mktemp("without") / "run")
    light = ModelSet.open([run], device="cpu", target_mlps=False).model
    mlps = sum(p.nbytes for p in light.pair.base_mlps.parameters())
    assert plan.target_mlps == mlps
    assert without.target_mlps == 0
    assert plan.peak_bytes - without.peak_bytes == mlps
    assert without.parts["weights"] == sum(p.nbytes for p in light.parameters())
    # A graph with its account and ablations runs without them, and has the same values.
    documents = []
    for each in (model, light):
        trace = record(each, torch.arange(30) + 5, rows=GRAPH.rows)
        graph = grow(trace, [contrast(trace, 7, 11, 29)], GRAPH)
        evidence = measure_evidence(trace, graph.leaves, graph.rows[0].target, EVIDENCE)
        weights = [row.weights.tolist() for row in graph.rows]
        documents.append((weights, account(trace, graph.rows[0]), evidence))
    assert documents[0] == documents[1]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_the_plan_of_7b_equals_all_blocks_on_fake_tensors(rows: int) -> None:
    pair = PairConfig("target", "base", dtype="float32", fused_blocks=False)
    adapter, config = AdapterConfig(8192), GraphConfig(rows=rows)
    none = EvidenceConfig(ablations=0)
    setup = GraphSetup(QWEN_7B, pair, adapter, 6000, 10.0, config=config, evidence=none)
    plan = graph_memory(setup)
    shapes = Setup(QWEN_7B, pair, adapter, ObjectiveConfig(), 1, 6000)
    with fake_pair(shapes, 28) as fake, LiveBytes() as live:
        model = ReplacementModel.create(fake, adapter).requires_grad_(False).eval()
        for parameter in model.parameters():
            live.see(parameter)
        assert live.alive == pytest.approx(plan.parts["weights"], rel=1e-3)
        trace = fake_trace(model, setup)
        live.peak = live.alive
        cotangent = trace.hidden[0].new_zeros(rows, *trace.hidden[0].shape)
        walk(trace, {(28, FINAL): cotangent}, lambda grads: None)
        assert live.peak + plan.parts["codes"] == pytest.approx(plan.phases["edges"], rel=0.01)
    if rows == 1:
        gpu = 76e9  # an 80 GB GPU without its reserve
        assert plan.peak_bytes < gpu
        longer = replace(setup, tokens=10_000)
        assert graph_memory(longer).peak_bytes > gpu
        assert graph_memory(replace(longer, target_mlps=False)).peak_bytes < gpu
