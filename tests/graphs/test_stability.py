"""Jaccard indices of sets of strongest features equal counts by hand; intervals are over texts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from documents import make_document

from fastadapt.errors import UserError
from fastadapt.graphs.stability import Fingerprint, jaccard, stability


def fingerprint(group: str, *features: int, active: int = 40) -> Fingerprint:
    chosen = frozenset((0, i) for i in features)
    return Fingerprint(group, chosen, chosen | {(0, i) for i in range(active)})


def test_the_strongest_features_of_a_file() -> None:
    document: Any = make_document()
    influence: dict[tuple[int, int], float] = {}
    for node in document["nodes"]:
        if node["kind"] == "feature":
            key = (node["layer"], node["feature"])
            influence[key] = influence.get(key, 0.0) + node["influence"]
    got = Fingerprint.of_graph("a", document, 5)
    assert got.active == set(influence)
    assert len(got.top) == 5
    left_out = max(influence[unit] for unit in got.active - got.top)
    assert min(influence[unit] for unit in got.top) >= left_out


def test_the_strongest_rank_components_of_a_file() -> None:
    document: Any = make_document(stream="ranks")
    for node in document["nodes"]:
        if node["kind"] == "feature":
            node["kind"] = "rank component"
    assert Fingerprint.of_graph("a", document, 5) == Fingerprint.of_graph("a", make_document(), 5)  # type: ignore[arg-type]


def test_texts_without_features_have_no_agreement() -> None:
    graphs = [
        fingerprint("a", 0, 1),
        fingerprint("a", 0, 2),  # 1 of 3
        fingerprint("b", active=0),
        fingerprint("b", active=0),
    ]
    assert math.isnan(jaccard(frozenset(), frozenset()))
    same, other = stability(graphs)
    assert (same.pairs, other.pairs) == (1, 4)  # not the pair of the texts of b
    assert same.jaccard == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert list(other.jaccard) == [0, 0, 0]
    with pytest.raises(UserError, match="expected graphs with features, got 2 without any"):
        stability(graphs[2:])


def test_agreement_within_groups_and_between_them() -> None:
    graphs = [
        fingerprint("a", 0, 1, 2, 3),
        fingerprint("a", 0, 1, 2, 9),  # 3 of 5
        fingerprint("b", 20, 21, 22, 23),
        fingerprint("b", 20, 21, 28, 29),  # 2 of 6
    ]
    same, other = stability(graphs, resamples=400)
    assert (same.name, same.pairs, other.pairs) == ("same group", 2, 4)
    assert same.jaccard[0] == pytest.approx((3 / 5 + 2 / 6) / 2)
    assert list(other.jaccard) == [0, 0, 0]
    assert 2 / 6 <= same.jaccard[1] <= same.jaccard[0] <= same.jaccard[2] <= 3 / 5
    # The control: as many features drawn from the files agree less than those of one group.
    assert same.chance < 2 / 6
    assert stability(graphs, resamples=400) == [same, other]


def test_equal_graphs_agree_and_few_graphs_are_refused() -> None:
    twice = [fingerprint("a", 1, 2), fingerprint("a", 1, 2)]
    (same,) = stability(twice)
    assert list(same.jaccard) == [1, 1, 1]
    with pytest.raises(UserError, match="--stability: expected graphs of two texts or more, got 1"):
        stability(twice[:1])
