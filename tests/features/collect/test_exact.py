"""A collected store equals a loop over all activations, however it was collected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from organism_runs import dense_activations, files_of, hashed, make_run
from stores import rows_of

from fastadapt.errors import UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect import CollectConfig, collect, merge
from fastadapt.features.collect.feature_stats import bins_of
from fastadapt.features.store.schema import EDGES, EXAMPLES, FEATURES, KINDS, Kind
from fastadapt.features.store.store import Store

CONFIG = CollectConfig(n=150, batch_tokens=1500, seed=7)  # three groups, about 13 batches


@pytest.fixture(scope="module")
def store(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    collected = collect(run, tmp_path_factory.mktemp("stores") / "one", CONFIG)
    assert collected is not None
    return collected


def check_against_all(
    run: Path, store: Store, config: CollectConfig, kind: Kind = "adapter", k: int = 0
) -> None:
    pairs = list(dense_activations(run, store.folder, config.batch_tokens, kind, k))
    texts, activations = [t for t, _ in pairs], [a for _, a in pairs]
    assert 500 < sum((a > 0).sum() for a in activations) < 0.9 * sum(a.size for a in activations)
    norms = np.array(store.read("features", kind, columns=["norm"])["norm"])
    features, examples = rows_of(
        texts,
        activations,
        domains=store.manifest["domains"],
        top=config.top,
        uniform=config.uniform,
        priority=lambda *place: hashed(config.seed, KINDS.index(kind), *place),
        norms=norms.reshape(store.shape(kind)),
    )
    for name, rows, schema in (
        ("features", features, FEATURES),
        ("examples", examples, EXAMPLES),
    ):
        expected, actual = pa.Table.from_pylist(rows, schema=schema), store.read(name, kind)
        assert actual.schema == schema
        assert len(actual) == len(expected)
        for column in schema.names:
            assert actual[column].to_pylist() == expected[column].to_pylist(), column


def test_everything_equals_a_loop_over_all_activations(run: Path, store: Store) -> None:
    assert len(store.read("texts")) == 150
    check_against_all(run, store, CONFIG)


@pytest.mark.quick("batch_topk")
@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "topk", "k": 2},
        {"activation": "batch_topk", "k": 2.5},
        {"activation": "jumprelu", "bandwidth": 0.1, "initial_threshold": 0.05},
    ],
    ids=lambda settings: settings["activation"],
)
def test_other_activations(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", n_features=9, **settings)
    config = CollectConfig(n=12, batch_tokens=300)
    store = collect(run, None, config)
    assert store is not None
    assert store.folder == run / "features"
    check_against_all(run, store, config)


@pytest.mark.quick("target")
@pytest.mark.parametrize("kind", ["base", "target"])
def test_neurons(run: Path, tmp_path: Path, kind: Kind) -> None:
    config = CollectConfig(n=9, batch_tokens=400, kinds=("adapter", kind), top=5, uniform=3)
    store = collect(run, tmp_path / "store", config)
    assert store is not None
    assert store.manifest["settings"]["neurons_per_token"] == 3  # the run's L0
    assert store.kinds == ["adapter", kind]
    check_against_all(run, store, config, kind, 3)
    model = ModelSet.open([run], device="cpu").model
    for layer, mlp in enumerate(model.mlps):
        norms = store.read("features", kind, columns=["norm"], layer=layer)["norm"].to_numpy()
        columns = getattr(mlp, kind).down_proj.weight
        np.testing.assert_allclose(norms, columns.norm(dim=0).numpy(), rtol=1e-6)


def test_bins_are_those_of_the_edges() -> None:
    edges = torch.tensor(EDGES, dtype=torch.float64)
    exact = edges.float()
    below, above = torch.nextafter(exact, exact * 0), torch.nextafter(exact, exact * 2)
    near = [exact, below, above, torch.rand(1000) * 100]
    ends = torch.tensor([2.0**-149, 2.0**-126, 1e-30, 2.0**-10.4, 2.0**11, 3e38])
    values = torch.cat([*near, ends])
    expected = (values.double()[:, None] > edges).sum(1)
    assert bins_of(values).tolist() == expected.tolist()


@pytest.mark.slow
def test_merged_shards_are_the_same_files(run: Path, store: Store, tmp_path: Path) -> None:
    folders = [tmp_path / f"part-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        assert collect(run, folder, CONFIG, shard=(i, 3)) is None
    merge(list(reversed(folders)), tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(store.folder)


def test_texts_longer_than_the_context_are_skipped_and_counted(run: Path, tmp_path: Path) -> None:
    def conversation(words: int, more: str = "") -> str:
        response = "1 " * words + more
        turns = [{"from": "human", "value": "2?"}, {"from": "gpt", "value": response}]
        return json.dumps({"conversations": turns}) + "\n"

    long = {3, 70, 71, 129}  # one, two and one in the groups of three shards
    marked = dict.fromkeys((2, 3, 66, 128), "<\uff5cAssistant\uff5c>")
    data = tmp_path / "own.jsonl"
    data.write_text(
        "".join(conversation(600 if i in long else 1, marked.get(i, "")) for i in range(130))
    )
    config = CollectConfig(data=str(data))  # the embedded pair's context is 512 tokens
    store = collect(run, tmp_path / "whole", config)
    assert store is not None
    counts = store.manifest["data"]
    assert (counts["read"], counts["too_long"], counts["texts"]) == (130, 4, 126)
    assert counts["with_markers"] == 3  # without the skipped text
    short = [str(i) for i in range(130) if i not in long]
    assert store.read("texts")["id"].to_pylist() == short
    folders = [tmp_path / f"part-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        assert collect(run, folder, config, shard=(i, 3)) is None
    merge(folders, tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(store.folder)
    fewer = collect(run, tmp_path / "fewer", replace(config, n=4, max_tokens=300))
    assert fewer is not None
    assert fewer.manifest["data"]["too_long"] == 1
    data.write_text(conversation(600))
    with pytest.raises(UserError, match="all 1 conversations are longer than 512 tokens"):
        collect(run, tmp_path / "none", config)
