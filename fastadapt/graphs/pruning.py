"""Leave out the parts of a graph with the least influence, and count what they carried."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from typing_extensions import NamedTuple  # which may be generic in Python 3.10, too

from fastadapt.errors import UserError

_Node = TypeVar("_Node", bound=Hashable)


@dataclass(frozen=True)
class PruneConfig:
    """How much of a graph to preserve.

    Args:
        node_threshold: share of the nodes' influence to preserve with the fewest nodes, 0 to 1.
        edge_threshold: the same for the edges between these nodes.
    """

    node_threshold: float = 0.8
    edge_threshold: float = 0.98

    def __post_init__(self) -> None:
        for name in ("node_threshold", "edge_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}: expected 0 to 1, got {getattr(self, name)}")


class Edge(NamedTuple, Generic[_Node]):
    """An edge, and the influence that flows through it."""

    source: _Node
    target: _Node
    weight: float
    influence: float


@dataclass(frozen=True)
class Pruned(Generic[_Node]):
    """What is left of a graph.

    Attributes:
        nodes: nodes by falling influence.
        edges: edges by falling influence.
        nodes_share: share of all nodes' influence.
        edges_share: share of all edges' influence.
    """

    nodes: list[_Node]
    edges: list[Edge[_Node]]
    nodes_share: float
    edges_share: float


def cumulative(values: Sequence[float]) -> list[float]:
    """Return for each value the share of the sum that it and all larger ones have.

    Example:
        >>> cumulative([1.0, 6.0, 3.0])
        [1.0, 0.6, 0.9]
    """
    total, seen = sum(values), 0.0
    shares = [1.0] * len(values)
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        seen += values[i]
        shares[i] = min(1.0, seen / total) if total else 1.0
    return shares


def prune(
    influence: Mapping[_Node, float],
    edges: Sequence[Edge[_Node]],
    config: PruneConfig,
    *,
    always: Collection[_Node] = (),
) -> Pruned[_Node]:
    """Leave out the nodes and edges of least influence.

    Edges to or from a node that is left out are left out too, and so are nodes that then have no
    path to a target.

    Args:
        influence: influence of each node that is no target.
        edges: edges between these nodes, and to targets.
        config: thresholds.
        always: nodes to preserve whatever their influence.
    """
    wanted = {*_largest(influence, influence, config.node_threshold), *always}
    targets = {edge.target for edge in edges} - influence.keys()
    inner = {
        i: edge.influence
        for i, edge in enumerate(edges)
        if edge.source in wanted and edge.target in wanted | targets
    }
    left = [edges[i] for i in _largest(inner, inner, config.edge_threshold)]
    reaching = {edge.source for edge in _to_targets(left, targets)}
    left = [edge for edge in left if edge.target in targets or edge.target in reaching]
    nodes = [node for node in influence if node in always or node in reaching]
    nodes.sort(key=lambda node: -influence[node])
    return Pruned(
        nodes,
        left,
        _share(sum(influence[node] for node in nodes), sum(influence.values())),
        _share(sum(edge.influence for edge in left), sum(edge.influence for edge in edges)),
    )


def _largest(keys: Collection[_Node], size: Mapping[_Node, float], threshold: float) -> list[_Node]:
    """Return the fewest keys whose sizes reach a share of the sum, the largest first."""
    order = sorted(keys, key=lambda key: -size[key])
    if threshold >= 1:
        return order
    before = [0.0, *cumulative([size[key] for key in order])[:-1]] if order else []
    return [key for key, share in zip(order, before, strict=True) if share < threshold]


def _to_targets(edges: Sequence[Edge[_Node]], targets: set[_Node]) -> list[Edge[_Node]]:
    """Return the edges on paths to targets."""
    into: dict[_Node, list[Edge[_Node]]] = {}
    for edge in edges:
        into.setdefault(edge.target, []).append(edge)
    on_paths, open_nodes, seen = [], list(targets), set(targets)
    while open_nodes:
        for edge in into.get(open_nodes.pop(), ()):
            on_paths.append(edge)
            if edge.source not in seen:
                seen.add(edge.source)
                open_nodes.append(edge.source)
    return on_paths


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
