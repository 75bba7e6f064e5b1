"""Grow a graph from its targets: expand the most influential features, a batch of rows at a time.

The *influence* of a node is the share of the targets that flows through it: a target has its
weight, and each row hands its influence to its sources in proportion to the size of their edges.
The edges that a row does not store, and features that are not expanded, end the flow; both are
counted as pruned.

N leaves, R rows, K kinds of leaves.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.graphs.attribution import KINDS, Leaves, Target, edges, unit_target
from fastadapt.graphs.linear.trace import Trace
from fastadapt.graphs.unfinished import Batches


@dataclass(frozen=True)
class GraphConfig:
    """Size of a graph.

    Args:
        nodes: features to expand, in the order of their influence on the targets.
        top: edges from features to store of each row, and as many from other leaves; the edges
            beyond are stored as sums.
        rows: backward passes to run at once; memory grows with it.
    """

    nodes: int = 128
    top: int = 256
    rows: int = 16

    def __post_init__(self) -> None:
        for name, least in (("nodes", 0), ("top", 1), ("rows", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: expected {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """The edges into one node: the largest ones, and exact sums of all.

    ``sum(weights) + remainder + constant`` is the node's value.

    Attributes:
        node: index of the feature among the leaves; None for a target of the graph.
        target: the quantity that the edges sum to.
        value: its value.
        sums: the sum of all edges from each kind of leaf, in the order of ``KINDS``.
        size: sum of the absolute values of all edges, and of the constant.
        first_position: the part of ``size`` from leaves at position 0.
        sources: int64: leaves of the stored edges, the largest first.
        weights: the stored edges.
        remainder: sum of the edges that are not stored.
        pruned: sum of their absolute values.
    """

    node: int | None
    target: Target
    value: float
    sums: tuple[float, ...]
    size: float
    first_position: float
    sources: Tensor
    weights: Tensor
    remainder: float
    pruned: float

    @property
    def shares(self) -> Tensor:
        """Each stored edge as a share of ``size``."""
        return self.weights.abs() / self.size if self.size > 0 else self.weights * 0


@dataclass(frozen=True)
class Flow:
    """Where the targets' influence ends; the parts sum to 1.

    Attributes:
        tokens, errors: share that ends at tokens, and at errors of the adapters.
        biases: share of decoder biases, other biases, and constants of features.
        pruned: share of edges that are not stored, and of features that are not expanded.
        completeness: mean over rows, weighted by influence, of the share of a row that comes from
            tokens and features and is stored.
    """

    tokens: float
    errors: float
    biases: float
    pruned: float
    completeness: float

    @property
    def replacement(self) -> float:
        """Share explained by tokens through features; all other parts count as unexplained."""
        return self.tokens


class Graph:
    """An attribution graph of one text.

    Attributes:
        trace: the text in the linearized model.
        leaves: all leaves of the text.
        rows: rows of the targets, then of the expanded features in order of expansion.
        n_targets: number of targets, of equal weight.
    """

    def __init__(self, trace: Trace, leaves: Leaves, rows: list[Row], n_targets: int) -> None:
        self.trace, self.leaves, self.rows, self.n_targets = trace, leaves, rows, n_targets

    @property
    def expanded(self) -> dict[int, int]:
        """The number of the row of each expanded feature."""
        return {row.node: i for i, row in enumerate(self.rows) if row.node is not None}

    def influence(self) -> tuple[Tensor, Tensor]:
        """Return the influence of each leaf, float64 ``[N]``, and of each row, ``[R]``."""
        of_leaves = torch.zeros(len(self.leaves), dtype=torch.float64)
        of_rows = torch.zeros(len(self.rows), dtype=torch.float64)
        of_rows[: self.n_targets] = 1 / self.n_targets
        # A unit's edges come from smaller depths only.
        depth = self.leaves.depth
        later = range(self.n_targets, len(self.rows))
        nodes = {i: int(self.rows[i].node or 0) for i in later}
        order = sorted(later, key=lambda i: -int(depth[nodes[i]]))
        for i in (*range(self.n_targets), *order):
            if i >= self.n_targets:
                of_rows[i] = of_leaves[nodes[i]]
            row = self.rows[i]
            of_leaves[row.sources] += of_rows[i] * row.shares.double()
        return of_leaves, of_rows

    def flow(self) -> Flow:
        """Return where the influence of the targets ends."""
        of_leaves, of_rows = self.influence()
        tokens, errors = (self.leaves.mask(kind) for kind in ("token", "error"))
        units = torch.arange(len(self.leaves)) < self.leaves.n_units
        open_units = units.clone()
        open_units[list(self.expanded)] = False
        pruned, constants, complete = float(of_leaves[open_units].sum()), 0.0, 0.0
        explained = units | tokens
        for row, share in zip(self.rows, of_rows.tolist(), strict=True):
            if row.size > 0:
                pruned += share * row.pruned / row.size
                constants += share * abs(row.target.constant) / row.size
            complete += share * float(row.shares[explained[row.sources]].sum())
        biases = float(of_leaves[~(units | tokens | errors)].sum()) + constants
        return Flow(
            tokens=float(of_leaves[tokens].sum()),
            errors=float(of_leaves[errors].sum()),
            biases=biases,
            pruned=pruned,
            completeness=complete / float(of_rows.sum()),
        )

    def paths(self, n: int = 5) -> list[tuple[float, list[int]]]:
        """Return the strongest paths from a token, bias, error or open feature to a target.

        The strength of a path is the product of its edges' shares of their rows, with the sign of
        the product of the edges.

        Returns:
            Pairs of signed strength and leaves, the first leaf last, the strongest path first.
        """
        expanded = self.expanded
        heap: list[tuple[float, int, float, list[int], int]] = []
        count = 0
        for i in range(self.n_targets):
            heapq.heappush(heap, (-1.0 / self.n_targets, count, 1.0, [], i))
            count += 1
        strongest: list[tuple[float, list[int]]] = []
        while heap and len(strongest) < n:
            size, _, sign, path, i = heapq.heappop(heap)
            if i < 0:
                strongest.append((-size * sign, path))
                continue
            row = self.rows[i]
            for leaf, weight, share in zip(
                row.sources.tolist(), row.weights.tolist(), row.shares.tolist(), strict=True
            ):
                if share > 0:
                    signed = sign if weight > 0 else -sign
                    heapq.heappush(
                        heap, (size * share, count, signed, [*path, leaf], expanded.get(leaf, -1))
                    )
                    count += 1
        return strongest


def grow(
    trace: Trace,
    targets: Sequence[Target],
    config: GraphConfig | None = None,
    *,
    progress: Callable[[int, int], Any] | None = None,
    batches: Batches | None = None,
) -> Graph:
    """Return the graph of targets on a traced text.

    Args:
        trace: the text; its ``rows`` decide how many rows are computed at once.
        targets: one or more targets, of equal weight.
        config: how much to expand and store.
        progress: called with the number of expanded features and the number to expand.
        batches: stores the rows as they are computed; those that it has are not computed again.

    Raises:
        RunError: the stored rows are not those of this computation.

    Example:
        >>> from fastadapt import AdapterConfig, ModelPair, PairConfig, ReplacementModel
        >>> from fastadapt.graphs.targets import logit
        >>> from fastadapt.graphs.linear.trace import record
        >>> pair = ModelPair.load(PairConfig("organism/target", "organism/base", device="cpu"))
        >>> model = ReplacementModel.create(pair, AdapterConfig(n_features=8)).eval()
        >>> trace = record(model, [5, 9, 4], rows=2)
        >>> graph = grow(trace, [logit(trace, 7, position=2)], GraphConfig(nodes=3))
        >>> row = graph.rows[0]
        >>> abs(sum(row.sums) - row.value) < 1e-4 * row.size
        True
    """
    config = config or GraphConfig()
    leaves, batches = Leaves(trace), batches or Batches()
    rows = _rows(trace, leaves, [None] * len(targets), targets, config.top, batches)
    graph = Graph(trace, leaves, rows, len(targets))
    n = min(config.nodes, leaves.n_units)
    while (done := len(rows) - len(targets)) < n:
        influence, _ = graph.influence()
        open_units = influence[: leaves.n_units].clone()
        open_units[list(graph.expanded)] = 0
        best = open_units.topk(min(trace.rows, n - done, len(open_units)))
        chosen = best.indices[best.values > 0].tolist()
        if not chosen:
            break
        into = [unit_target(trace, leaves, i) for i in chosen]
        rows.extend(_rows(trace, leaves, chosen, into, config.top, batches))
        if progress is not None:
            progress(len(rows) - len(targets), n)
    return graph


def _rows(
    trace: Trace,
    leaves: Leaves,
    nodes: Sequence[int | None],
    targets: Sequence[Target],
    top: int,
    batches: Batches,
) -> list[Row]:
    """Return the rows of targets, from the next stored batch if there is one."""

    def compute() -> dict[str, Tensor]:
        weights = zip(nodes, targets, edges(trace, leaves, targets), strict=True)
        return _packed([_row(trace, leaves, *each, top) for each in weights])

    packed = batches.next(compute)
    values = [target.value(trace) for target in targets]
    numbers = [-1 if node is None else node for node in nodes]
    if packed["nodes"].tolist() != numbers or packed["value"].tolist() != values:
        raise batches.misfit()
    return _unpacked(packed, targets)


#: Numbers of a row that a batch stores, each as float64 ``[rows]``.
_NUMBERS = ("value", "size", "first_position", "remainder", "pruned")


def _packed(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as tensors, without their targets."""

    def column(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return {
        "nodes": torch.tensor([-1 if row.node is None else row.node for row in rows]),
        "sums": column([row.sums for row in rows]),
        "counts": torch.tensor([len(row.sources) for row in rows]),
        "sources": torch.cat([row.sources for row in rows]),
        "weights": torch.cat([row.weights for row in rows]),
        **{name: column([getattr(row, name) for row in rows]) for name in _NUMBERS},
    }


def _unpacked(packed: Mapping[str, Tensor], targets: Sequence[Target]) -> list[Row]:
    counts = packed["counts"].tolist()
    parts = zip(packed["sources"].split(counts), packed["weights"].split(counts), strict=True)
    return [
        Row(
            node=None if packed["nodes"][i] < 0 else int(packed["nodes"][i]),
            target=target,
            sums=tuple(packed["sums"][i].tolist()),
            sources=sources,
            weights=weights,
            **{name: float(packed[name][i]) for name in _NUMBERS},
        )
        for i, (target, (sources, weights)) in enumerate(zip(targets, parts, strict=True))
    ]


def _row(
    trace: Trace, leaves: Leaves, node: int | None, target: Target, row: Tensor, top: int
) -> Row:
    size = row.double().abs()
    sums = torch.zeros(len(KINDS), dtype=torch.float64)
    sums.index_add_(0, leaves.kind, row.double())
    n = leaves.n_units
    largest = [part.topk(min(top, len(part))).indices for part in (size[:n], size[n:])]
    sources = torch.cat([largest[0], largest[1] + n])
    sources = sources[size[sources].argsort(descending=True, stable=True)]
    sources = sources[size[sources] > 0]
    stored = row[sources].double()
    whole = float(size.sum())
    return Row(
        node=node,
        target=target,
        value=target.value(trace),
        sums=tuple(sums.tolist()),
        size=whole + abs(target.constant),
        first_position=float(size[leaves.position == 0].sum()),
        sources=sources,
        weights=stored,
        remainder=float(row.double().sum() - stored.sum()),
        pruned=max(0.0, whole - float(stored.abs().sum())),
    )
