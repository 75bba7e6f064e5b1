"""Judgements of collected units: features of the embedded pair's adapters, and neurons."""

from __future__ import annotations

import pytest
from organism_runs import make_run

from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.autointerp.activations import ModelActivations
from fastadapt.features.autointerp.describe import describe
from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.store.schema import KINDS
from fastadapt.features.store.store import Store

NEURONS = 3


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelActivations]:
    run = make_run(tmp_path_factory.mktemp("run") / "made")
    config = CollectConfig(n=60, kinds=KINDS, neurons_per_token=NEURONS)
    store = collect(run, config=config, device="cpu")
    assert store is not None
    models = ModelSet.open([run], device="cpu")
    model = models.replacement(models.runs[0])
    return store, ModelActivations(model, neurons_per_token=NEURONS, batch_tokens=300)


@pytest.mark.quick("adapter")
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_the_collection(
    collected: tuple[Store, ModelActivations], kind: str
) -> None:
    store, activations = collected
    n_layers, n_features = store.shape(kind)  # type: ignore[arg-type]
    texts = store.read("texts")["tokens"].to_pylist()
    units = {layer: list(range(n_features)) for layer in range(n_layers)}
    places = activations.places(kind, texts, units)  # type: ignore[arg-type]
    rows = store.read("features", kind).to_pylist()  # type: ignore[arg-type]
    counts = {(row["layer"], row["feature"]): row["count"] for row in rows}
    assert {unit: len(of_unit) for unit, of_unit in places.items()} == counts
    examples = store.read("examples", kind).to_pylist()  # type: ignore[arg-type]
    result = {unit: set(map(tuple, of_unit.tolist())) for unit, of_unit in places.items()}
    assert all((r["text"], r["position"]) in result[r["layer"], r["feature"]] for r in examples)


@pytest.mark.slow
def test_features_and_neurons_are_described_side_by_side(
    collected: tuple[Store, ModelActivations],
) -> None:
    store, activations = collected
    config = DescribeConfig(units=6, before=8, after=4)
    result = describe(store, TokenJudge(), config, activations)
    assert result is not None
    assert set(result["detection"]) == set(KINDS)
    for kind in KINDS:
        rows = store.read("scores", kind).to_pylist()
        assert rows
        assert all(row["positives"] == row["negatives"] == 5 for row in rows)
    assert result["detection"]["adapter"]["top"]["accuracy"]["mean"] > 0.5
