"""A collected store holds what a loop over every activation finds, whatever the way it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from organism_runs import dense_activations, files_of, hashed, make_run
from stores import rows_of

from fastadapt.features.collect import CollectConfig, collect, merge
from fastadapt.features.schema import EXAMPLES, FEATURES
from fastadapt.features.store import Store

CONFIG = CollectConfig(n=150, batch_tokens=1500, seed=7)  # three groups, some 13 batches


@pytest.fixture(scope="module")
def store(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    found = collect(run, tmp_path_factory.mktemp("stores") / "one", CONFIG)
    assert found is not None
    return found


def check_against_all(run: Path, store: Store, config: CollectConfig) -> None:
    pairs = list(dense_activations(run, store.folder, config.batch_tokens))
    texts, activations = [t for t, _ in pairs], [a for _, a in pairs]
    norms = np.array(store.read("features", columns=["norm"])["norm"])
    features, examples = rows_of(
        texts,
        activations,
        domains=store.manifest["domains"],
        priority=lambda *place: hashed(config.seed, 0, *place),
        norms=norms.reshape(store.shape("adapter")),
    )
    for name, rows, schema in (
        ("features", features, FEATURES),
        ("examples", examples, EXAMPLES),
    ):
        expected, found = pa.Table.from_pylist(rows, schema=schema), store.read(name)
        assert found.schema == schema
        assert len(found) == len(expected)
        for column in schema.names:
            assert found[column].to_pylist() == expected[column].to_pylist(), column


def test_everything_equals_a_loop_over_all_activations(run: Path, store: Store) -> None:
    assert len(store.read("texts")) == 150
    check_against_all(run, store, CONFIG)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "topk", "k": 2},
        {"activation": "batch_topk", "k": 2.5},
        {"activation": "jumprelu", "bandwidth": 0.1, "initial_threshold": 0.05},
    ],
    ids=lambda settings: settings["activation"],
)
def test_other_activations_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", n_features=9, **settings)
    config = CollectConfig(n=12, batch_tokens=300)
    store = collect(run, None, config)
    assert store is not None
    assert store.folder == run / "features"
    check_against_all(run, store, config)


def test_merged_shards_are_the_same_files(run: Path, store: Store, tmp_path: Path) -> None:
    folders = [tmp_path / f"part-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        assert collect(run, folder, CONFIG, shard=(i, 3)) is None
    merge(list(reversed(folders)), tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(store.folder)
