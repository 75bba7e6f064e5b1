"""Sets of features: operations, files and errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.features.store.sets import (
    FeatureSet,
    find_set,
    list_sets,
    load_set,
    names_of_sets,
    read_set,
    save_set,
)
from fastadapt.features.store.store import Store

OF: dict[str, Any] = {"adapter": "0" * 64, "shape": (2, 6)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rng = np.random.default_rng(1)
    texts = [StoreText(list(rng.integers(0, 30, 8)), [5] * 8)]
    activations = [np.maximum(rng.normal(size=(2, 8, 6)), 0).astype(np.float32)]
    return make_store(tmp_path / "features", texts, activations, [f"w{i}" for i in range(30)]).store


def feature_set(*pairs: tuple[int, int], by: str = "hand") -> FeatureSet:
    return FeatureSet.from_pairs(pairs, **OF, expression=by)


def test_set_operations() -> None:
    a, b = feature_set((1, 5), (0, 2), (0, 2), by="a"), feature_set((1, 5), (1, 0), by="b")
    assert a.features == ((0, 2), (1, 5))
    assert (a | b).features == ((0, 2), (1, 0), (1, 5))
    assert (a & b).features == ((1, 5),)
    assert (a - b).features == ((0, 2),)
    assert len(~a) == 10
    assert not (a & ~a).features
    assert (a | ~a).features == (~(a & ~a)).features
    assert (a | b).expression == "(a) | (b)"
    assert ((a | b) - a).expression == "((a) | (b)) - (a)"
    assert (1, 5) in a
    assert (1, 4) not in a
    assert a.rows(1) == [5]
    assert (a | b).per_layer() == [1, 2]


def test_membership_takes_no_pass_over_the_set() -> None:
    """Many look-ups in a large set cost less than a few passes over it."""
    pairs = [(layer, i) for layer in range(20) for i in range(1000)]
    large = FeatureSet.from_pairs(pairs, adapter="", shape=(20, 2000), expression="large")
    assert (0, 0) in large
    start = time.process_time()
    for _ in range(20):
        frozenset(pairs)
    middle = time.process_time()
    assert not any((0, 1000 + i) in large for i in range(1000))
    assert time.process_time() - middle < middle - start


def test_sets_of_two_adapters_do_not_combine() -> None:
    other = FeatureSet.from_pairs([(0, 1)], adapter="1" * 64, shape=(2, 6), expression="other")
    with pytest.raises(
        UserError, match="the set hand and the set other were selected from different adapters"
    ):
        feature_set((0, 1)) | other


def test_a_set_is_saved_and_listed(store: Store) -> None:
    a = feature_set((0, 2), (1, 5))
    path = save_set(store, a, "mine")
    assert path == store.folder / "sets" / "mine.json"
    again = load_set(store, "mine")
    assert (again.features, again.expression, again.name) == (a.features, "hand", "mine")
    for source, named in ((store.folder, "mine"), (store.folder.parent, "mine"), ("", str(path))):
        assert find_set(source, named) == again
    assert again.digest() == a.digest() != feature_set((0, 2)).digest()
    with pytest.raises(UserError, match="has a set 'mine' already"):
        save_set(store, feature_set((0, 0)), "mine")
    save_set(store, feature_set((0, 0)), "mine", overwrite=True)
    (path.parent / "folder.json").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a folder; expected a file"):
            save_set(store, a, "folder", overwrite=overwrite)
    (path.parent / "folder.json").rmdir()
    save_set(store, a, "another")
    assert names_of_sets(store) == ["another", "mine"]
    assert list_sets(store)[0] == {
        "name": "another",
        "size": 2,
        "per_layer": [1, 1],
        "made": "hand",
        "stale": False,
    }
    assert not [p for p in path.parent.iterdir() if p.suffix != ".json"]


def test_a_set_of_another_adapter_is_listed_as_stale(store: Store) -> None:
    save_set(store, feature_set((0, 2)), "mine")
    for name, change in (("other", {"adapter": "1" * 64}), ("wider", {"n_features": 7})):
        path = save_set(store, feature_set((1, 5)), name)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change, "name": name}))
    assert [(s["name"], s["size"], s["stale"]) for s in list_sets(store)] == [
        ("mine", 1, False),
        ("other", 1, True),
        ("wider", 1, True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "set 'mine' is empty"),
        ({"features": [[2, 0]]}, "layers 0 to 1 and numbers 0 to 5, got feature 0 of layer 2"),
        ({"features": [[0, -1]]}, r"\[0\]\[1\]: expected int >= 0"),
        ({"features": [[0, 6]]}, "got feature 6 of layer 0"),
        ({"features": [[1, 0], [0, 1]]}, "sorted by layer and number"),
        ({"features": [[1, 0], [1, 0]]}, "distinct"),
        ({"features": [[1]]}, r"features\[0\]: expected array of length 2"),
        ({"features": None}, "features: expected array, got null"),
        ({"adapter": "1" * 64}, "set 'mine' was selected from other adapters"),
        ({"n_features": 7}, "set 'mine' was selected from other adapters"),
        ({"schema_version": 7}, "schema_version is 7"),
    ],
)
def test_a_damaged_set_is_refused(store: Store, change: dict, message: str) -> None:
    path = save_set(store, feature_set((0, 2)), "mine")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_set(store, "mine")


def test_missing_empty_and_foreign_sets_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no set 'mine'; saved sets: none yet"):
        load_set(store, "mine")
    with pytest.raises(UserError, match="the set hand is empty"):
        save_set(store, feature_set(), "mine")
    other = FeatureSet.from_pairs([(0, 1)], adapter="1" * 64, shape=(2, 6), expression="other")
    with pytest.raises(UserError, match="was selected from other adapters than those of"):
        save_set(store, other, "mine")
    for name in ("", ".x", "a/b", "..", "a b"):
        with pytest.raises(UserError, match="a set's name"):
            save_set(store, feature_set((0, 1)), name)
    assert not (store.folder / "sets").exists()
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_set(tmp_path / "x.json")
    with pytest.raises(UserError, match="is missing"):
        read_set(tmp_path / "none.json")


@pytest.mark.parametrize("pair", [[0, 0.5], [0, "1"], [0, True], [0, 1.0], [0, 10**30]])
def test_a_set_takes_integers_only_and_a_broken_one_is_listed(store: Store, pair: list) -> None:
    save_set(store, feature_set((0, 2)), "whole")
    path = save_set(store, feature_set((0, 2)), "broken")
    path.write_text(json.dumps({**json.loads(path.read_text()), "features": [pair]}))
    with pytest.raises(UserError, match=r"broken\.json.*features"):
        load_set(store, "broken")
    broken, whole = list_sets(store)
    assert broken["name"] == "broken"
    assert "broken.json" in broken["broken"]
    assert whole["size"] == 1
