"""Pruning preserves the largest parts, and reports the influence that it leaves out."""

from __future__ import annotations

import pytest

from fastadapt.errors import UserError
from fastadapt.graphs.pruning import Edge, PruneConfig, cumulative, prune

# The target reads a and b; a reads c and d; b reads e.
INFLUENCE = {"a": 0.7, "b": 0.3, "c": 0.5, "d": 0.2, "e": 0.3}
EDGES = [
    Edge("a", "T", 7.0, 0.7),
    Edge("b", "T", -3.0, 0.3),
    Edge("c", "a", 5.0, 0.5),
    Edge("d", "a", -2.0, 0.2),
    Edge("e", "b", 1.0, 0.3),
]


def test_nothing_is_left_out_for_thresholds_of_1() -> None:
    left = prune(INFLUENCE, EDGES, PruneConfig(1, 1))
    assert left.nodes == ["a", "c", "b", "e", "d"]
    assert sorted(left.edges) == sorted(EDGES)
    assert (left.nodes_share, left.edges_share) == (1, 1)


def test_the_fewest_nodes_and_edges_that_reach_the_shares() -> None:
    left = prune(INFLUENCE, EDGES, PruneConfig(0.6, 1))
    assert left.nodes == ["a", "c"]  # 0.7 + 0.5 of 2.0
    assert left.nodes_share == pytest.approx(0.6)
    assert left.edges == [EDGES[0], EDGES[2]]
    assert left.edges_share == pytest.approx(1.2 / 2.0)
    left = prune(INFLUENCE, EDGES, PruneConfig(0.61, 1))
    assert left.nodes == ["a", "c", "b"]
    left = prune(INFLUENCE, EDGES, PruneConfig(1, 0.3))
    assert left.edges == [EDGES[0]]
    assert left.nodes == ["a"]


def test_what_has_no_path_to_a_target_is_left_out() -> None:
    # Without the edge from b to the target, b and e explain nothing.
    edges = [edge for edge in EDGES if edge.source != "b"]
    left = prune(INFLUENCE, edges, PruneConfig(1, 1))
    assert left.nodes == ["a", "c", "d"]
    assert all(edge.source != "e" for edge in left.edges)
    left = prune(INFLUENCE, edges, PruneConfig(0.1, 1), always=["e"])
    assert left.nodes == ["a", "e"]


def test_cumulative_shares_and_thresholds() -> None:
    assert cumulative([]) == []
    assert cumulative([0.0, 0.0]) == [1, 1]
    assert prune({}, [], PruneConfig()).nodes == []
    for settings in ({"node_threshold": 1.1}, {"edge_threshold": -0.1}):
        with pytest.raises(UserError, match="expected 0 to 1, got"):
            PruneConfig(**settings)
