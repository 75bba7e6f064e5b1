"""Test a graph: its account of the difference to the hybrid, and ablations beside predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.graphs.ablation import Surgery, run, run_changed
from fastadapt.graphs.attribution import KINDS, Leaves, Target, depth_of, edges
from fastadapt.graphs.graph import GraphConfig, Row, grow
from fastadapt.graphs.linear.rules import without_ranks
from fastadapt.graphs.linear.trace import Trace, record
from fastadapt.graphs.unfinished import Batches


class Account(NamedTuple):
    """The change of a target's value when the adapters are off, and the parts of the graph's row.

    ``with_adapters - hybrid`` is the sum of ``features``, ``decoder_biases``, ``errors``,
    ``coefficients`` and ``remainder``.
    """

    with_adapters: float  #: value on the graph's stream
    hybrid: float  #: value in the hybrid, on the same text
    features: float  #: edges of active features, or of rank components
    decoder_biases: float  #: edges of the adapters' biases
    errors: float  #: edges of errors; 0 for the stream ``replacement``
    #: Change of what tokens and frozen biases give, because attention patterns, gates and norms
    #: differ from the hybrid's.
    coefficients: float
    remainder: float  #: what the row misses of the value: rounding


def account(trace: Trace, row: Row) -> Account:
    """Split the difference between a graph's stream and the hybrid, for the row of a target.

    Tokens and frozen biases are leaves of the hybrid too. With held coefficients, they give its
    whole value there; here they give another part, and the change is the coefficients'. For rank
    components, which may lie in attention too, the hybrid is the target without its low-rank parts.
    Transcoders that stand for the base's MLPs do not enter: they are no part of the difference.
    """
    if trace.overlay is not None:
        plain = record(trace.model, trace.ids, stream=trace.stream)
        return account(plain, grow(plain, [row.target], GraphConfig(nodes=0)).rows[0])
    if trace.features == "ranks":
        with without_ranks(trace.model):
            off = float(run(trace.model, trace.ids[None], row.target, "target"))
    else:
        off = float(run(trace.model, trace.ids[None], row.target, "hybrid"))
    sums = dict(zip(KINDS, row.sums, strict=True))
    shared = sums["token"] + sums["attention bias"] + sums["mlp bias"]
    return Account(
        with_adapters=row.value,
        hybrid=off,
        features=sums["feature"] + sums["rank component"],
        decoder_biases=sums["decoder bias"],
        errors=sums["error"],
        coefficients=shared + row.target.constant - off,
        remainder=row.value - sum(row.sums) - row.target.constant,
    )


@dataclass(frozen=True)
class EvidenceConfig:
    """Ablations that test a graph.

    Args:
        ablations: features to ablate one by one: the strongest of the graph, and as many drawn
            uniformly from those that can reach the target; at least 3; 0: no evidence.
        copies: ablated copies of the text to run at once.
        seed: seed of the draws and of the bootstrap.
        resamples: bootstrap samples of the intervals.
    """

    ablations: int = 64
    copies: int = 16
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        least_ablations = 0 if self.ablations == 0 else 3
        for name, least in (("ablations", least_ablations), ("copies", 1), ("resamples", 200)):
            if getattr(self, name) < least:
                raise UserError(
                    f"--evidence.{name}: expected {least} or more, got {getattr(self, name)}"
                )


class Correlation(NamedTuple):
    """Agreement of a predictor with measured effects, with ends of 95% intervals over nodes."""

    predictor: str
    spearman: tuple[float, float, float]  #: estimate, low, high
    pearson: tuple[float, float, float]


class Curve(NamedTuple):
    """Ablating, or isolating, the first n features in the graph's order, and in a random order.

    ``ablated`` are effects as shares of the effect of ablating all of them. ``isolated`` are shares
    of that effect which do not occur while only n features stay.
    """

    n: list[int]
    ablated: list[float]
    ablated_random: list[float]
    isolated: list[float]
    isolated_random: list[float]


class Sample(NamedTuple):
    """Features that were ablated one by one, and the agreement of their effects with predictors.

    ``name`` says which features: the ``strongest`` in the graph's order, or a ``random`` draw.
    ``effects`` are values without a feature minus values with it.
    """

    name: str
    nodes: list[int]
    effects: list[float]
    correlations: list[Correlation]


class Evidence(NamedTuple):
    """Measured effects of ablations beside their predictions.

    ``returned`` is the share of the strongest features' effects with held adapters that later
    adapters undo (negative: that they add to).
    """

    samples: list[Sample]
    curve: Curve
    returned: float


def ablation_candidates(trace: Trace, leaves: Leaves, target: Target) -> Tensor:
    """Return the leaves, int64 ``[n]``, of the features or rank components that reach a target.

    Raises:
        UserError: fewer than 3 reach it.
    """
    n = leaves.n_ablated
    reach = (leaves.position[:n] <= target.position) & (leaves.depth[:n] < target.depth)
    # After the last attention before the target, a position reaches itself alone.
    layer = trace.n_layers - 1 if target.layer is None else target.layer
    reach &= (leaves.position[:n] == target.position) | (leaves.depth[:n] < depth_of(layer, 1))
    nodes = reach.nonzero()[:, 0]
    if len(nodes) < 3:
        what = "rank components" if trace.stream == "ranks" else "features"
        raise UserError(
            f"evidence: expected 3 or more {what} before the target, got {len(nodes)}; give "
            "--evidence.ablations 0 for a graph without ablations"
        )
    return nodes


def measure_evidence(
    trace: Trace,
    leaves: Leaves,
    target: Target,
    config: EvidenceConfig | None = None,
    *,
    batches: Batches | None = None,
) -> Evidence:
    """Ablate features one by one and in groups, and compare with what the graph predicts.

    The prediction of a feature's effect is minus its edge through all paths: directly, and through
    active features of later layers, which respond in proportion. Compared predictors are the direct
    edge, the size of the activation (times the norm of the decoder row) and random numbers.

    In the stream ``ranks`` all this is so of rank components in place of features.

    Args:
        trace: the text.
        leaves: its leaves.
        target: what the graph explains.
        config: how many ablations.
        batches: stores the effects as they are measured; those that it has are not measured again.

    Raises:
        UserError: fewer than 3 features can reach the target, or their effects, or the predictions
            of a predictor, are all equal.
    """
    config = config or EvidenceConfig()
    n, ranks_alone = leaves.n_ablated, trace.stream == "ranks"
    nodes = ablation_candidates(trace, leaves, target)
    draw = torch.Generator().manual_seed(config.seed)
    linear = replace(trace, features="linear ranks" if ranks_alone else "linear")
    total = edges(linear, leaves, [target])[0, :n]
    direct = edges(trace, leaves, [target])[0, :n]
    order = nodes[total[nodes].abs().argsort(descending=True)]
    drawn = nodes[torch.randperm(len(nodes), generator=draw)]
    ablations = _Ablations(trace, leaves, target, config.copies, batches or Batches())
    samples, predictors = [], _predictors(trace, leaves, total, direct, draw)
    for name, chosen in (("strongest", order), ("random", drawn)):
        sample = chosen[: config.ablations]
        for predictor, values in predictors.items():
            _check_differ(f"predictions by {predictor}", values[sample], name)
        effects = ablations.effects([i[None] for i in sample])
        _check_differ("effects", effects, name)
        samples.append(_sample(name, sample, effects, predictors, config, draw))
    strongest = order[: config.ablations]
    held = ablations.effects([i[None] for i in strongest], held=True)
    free = torch.tensor(samples[0].effects, dtype=torch.float64)
    return Evidence(
        samples,
        _curve(ablations, order, draw),
        returned=1 - float((free * held.sign()).sum() / held.abs().sum()),
    )


def _check_differ(what: str, values: Tensor, sample: str) -> None:
    """Raise if all values are equal, so that no correlation with them is defined."""
    if len(values.unique()) < 2:
        value = float(values[0]) + 0.0  # no -0
        raise UserError(
            f"evidence: expected ablations with different {what}, got {value:g} for all "
            f"{len(values)} {sample} ones; give more --evidence.ablations, or 0 for a graph "
            "without ablations, with --overwrite"
        )


def _predictors(
    trace: Trace, leaves: Leaves, total: Tensor, direct: Tensor, draw: torch.Generator
) -> dict[str, Tensor]:
    """Return predicted effects of ablating each unit, float64 ``[units]``."""
    n = leaves.n_ablated
    norms = torch.cat(
        [
            units.decoder.norm(dim=1)[units.codes.features - units.first].cpu()
            for units, rows in leaves.groups
            if rows.start < n
        ]
    )
    return {
        "graph": -total.double(),
        "direct edge": -direct.double(),
        "activation": -(leaves.activation[:n] * norms).double(),
        "random": torch.randn(n, generator=draw, dtype=torch.float64),
    }


def _sample(
    name: str,
    nodes: Tensor,
    effects: Tensor,
    predictors: dict[str, Tensor],
    config: EvidenceConfig,
    draw: torch.Generator,
) -> Sample:
    picks = torch.randint(len(nodes), (config.resamples, len(nodes)), generator=draw)
    correlations = [
        Correlation(
            predictor,
            _interval(ranks(values[nodes]), ranks(effects), picks),
            _interval(values[nodes], effects, picks),
        )
        for predictor, values in predictors.items()
    ]
    return Sample(name, nodes.tolist(), effects.tolist(), correlations)


@dataclass(frozen=True)
class _Ablations:
    """Measures effects of ablations on a target, ``copies`` of them at once."""

    trace: Trace
    leaves: Leaves
    target: Target
    copies: int
    batches: Batches

    def effects(self, sets: Sequence[Tensor], *, keep: bool = False, held: bool = False) -> Tensor:
        """Return the change of the target's value by each surgery, float64 ``[sets]``."""
        values = []
        # The unchanged text runs in the same batch: another batch size rounds differently.
        none = torch.arange(self.leaves.n_ablated) if keep else torch.empty(0, dtype=torch.int64)
        for i in range(0, len(sets), self.copies):
            surgery = Surgery([none, *sets[i : i + self.copies]], keep=keep, held=held)
            changed = self.batches.next(partial(self._changed, surgery))["values"]
            values.append(changed[1:] - changed[0])
        return torch.cat(values)

    def _changed(self, surgery: Surgery) -> dict[str, Tensor]:
        values = run_changed(self.trace, self.leaves, self.target, surgery)
        return {"values": values.double().cpu()}


def _curve(ablations: _Ablations, order: Tensor, draw: torch.Generator) -> Curve:
    sizes = sorted({min(2**i, len(order)) for i in range(len(order).bit_length() + 1)})
    shuffled = order[torch.randperm(len(order), generator=draw)]
    columns = []
    for keep in (False, True):
        whole = order[:0] if keep else order  # both leave no feature of the order
        without = ablations.effects([whole], keep=keep)
        for ranking in (order, shuffled):
            share = ablations.effects([ranking[:n] for n in sizes], keep=keep) / without
            columns.append((1 - share if keep else share).tolist())
    return Curve(sizes, *columns)


def ranks(values: Tensor) -> Tensor:
    """Return the ranks of ``[n]`` values as float64, ties with their mean rank.

    Example:
        >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
        [1.5, 0.0, 1.5]
    """
    below = (values[None] < values[:, None]).sum(1)
    ties = (values[None] == values[:, None]).sum(1)
    return below.double() + (ties.double() - 1) / 2


def _interval(x: Tensor, y: Tensor, picks: Tensor) -> tuple[float, float, float]:
    """Return the correlation of ``[n]`` values, and its 95% percentile interval over nodes."""
    drawn = _correlation(x[picks], y[picks])
    drawn = drawn[drawn.isfinite()]
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(_correlation(x, y)), low, high


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
