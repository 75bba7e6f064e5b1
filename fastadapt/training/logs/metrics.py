"""Metrics of a training step: loss terms, L0, dead features, codes of each call.

The metrics are gathered on the device and read in one copy. L layers, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.distributed.ranks import ALONE, Ranks
from fastadapt.kernels.transcoder import CodeLayout
from fastadapt.objective import ObjectiveOutput
from fastadapt.training.code_capacity import Call

#: Edges of the density histogram: log10 of the share of tokens on which a feature fires.
DENSITY_EDGES = [-7 + i / 4 for i in range(29)]


_STATISTICS = ("n_active", "n_tokens", "n_codes", "min_active")  # 0-d statistics of a call


class StepReport(NamedTuple):
    """Metrics of a step on the host.

    Attributes:
        terms: the objective's metrics, averaged over the step's sequences.
        losses: the loss of each micro-batch.
        grad_norm: norm of the summed gradient before clipping.
        l0_per_layer: active features per token; empty for a baseline.
        dead_per_layer: features that did not fire within the dead window; empty for a baseline.
        calls: the transcoders' calls, ``[micro-batch][layer]``.
    """

    terms: dict[str, float]
    losses: list[float]
    grad_norm: float
    l0_per_layer: list[float]
    dead_per_layer: list[int]
    calls: list[list[Call]]

    @property
    def finite(self) -> bool:
        """Whether all losses and the gradient are finite, so that the step may be applied."""
        return all(map(math.isfinite, (self.grad_norm, *self.losses)))

    @property
    def broken(self) -> list[int]:
        """Indices of the micro-batches whose loss is not finite."""
        return [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]


class StepGatherer:
    """Gather the metrics of one optimiser step's micro-batches without waiting for the device.

    Every rank adds its micro-batches. Then all ranks call :meth:`combine`, after which each has the
    metrics of the whole step, in the order of a run on one rank.

    Args:
        ranks: ranks that share the step.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._names: list[str] = []
        self._n_streams: list[int] = []  # [L]
        self._rows: list[Tensor] = []  # per micro-batch: terms, whether valid, loss, statistics
        self._host_rows: list[list[int]] = []  # per micro-batch: tokens, capacities [L]
        self._fired: list[Tensor] = []  # bool [L, F]

    def add(self, out: ObjectiveOutput, weight: float, tokens: int) -> None:
        """Record the metrics of a micro-batch on the device.

        Args:
            out: result of the objective.
            weight: share of the step's sequences; 0 for a repeated micro-batch that does not count
                (:meth:`fastadapt.distributed.ranks.Ranks.shard`).
            tokens: number of tokens without padding.
        """
        self._names = list(out.metrics)
        self._n_streams = [call.n_streams for call in out.calls]
        capacities = [_capacity(call.plan) for call in out.calls]
        loss, stats = out.metrics["loss"], [call.stats for call in out.calls]
        fits = [
            call.stats.n_codes <= capacity
            for call, capacity in zip(out.calls, capacities, strict=True)
            if capacity >= 0
        ]
        columns = [
            torch.stack(list(out.metrics.values())).double() * weight,
            torch.stack([loss.isfinite(), *fits]).all()[None],
            loss[None],
            *(_stacked([getattr(s, name) for s in stats], loss) for name in _STATISTICS),
        ]
        self._rows.append(torch.cat([column.double() for column in columns]))
        self._host_rows.append([tokens, *capacities])
        self._fired.append(_stacked([s.fired for s in stats], loss).bool())

    def combine(self, n_micro_batches: int) -> None:
        """Gather the metrics of all ranks' ``n_micro_batches`` micro-batches, on every rank."""
        n_layers = len(self._n_streams)
        sizes = [len(self._names), 1, 1, *(n_layers for _ in _STATISTICS)]
        rows = self._ranks.interleave(torch.stack(self._rows))[:n_micro_batches]
        self._terms, self._fits, self._loss, *statistics = rows.split(sizes, dim=1)
        self._statistics = dict(zip(_STATISTICS, statistics, strict=True))
        host_rows = self._ranks.interleave(torch.tensor(self._host_rows))
        self._host_rows = host_rows[:n_micro_batches].tolist()

    @property
    def tokens(self) -> int:
        """Number of tokens of the step."""
        return sum(tokens for tokens, *_ in self._host_rows)

    def fired(self) -> Tensor:
        """Return bool [L, F], true for features that fired in the step; [0] for a baseline."""
        return self._ranks.all_reduce_or(torch.stack(self._fired).any(0))

    def valid(self, grad_norm: Tensor) -> Tensor:
        """Return a 0-d bool on the device: loss and gradient are finite, and no call overflows."""
        return self._fits.bool().all() & grad_norm.isfinite()

    def min_active(self) -> Tensor:
        """Return [L], the smallest active value, averaged over micro-batches; NaN if none fired."""
        return self._statistics["min_active"].nanmean(0)

    def report(self, grad_norm: Tensor, dead_L: Tensor) -> StepReport:
        """Read all metrics in one copy from the device."""
        statistics = self._statistics
        parts = [
            self._terms.sum(0),
            self._loss,
            grad_norm,
            statistics["n_active"].sum(0) / statistics["n_tokens"].sum(0).clamp(min=1),
            dead_L,
            statistics["n_codes"],
        ]
        sizes = [part.numel() for part in parts]
        flat = torch.cat([part.double().flatten() for part in parts]).cpu().split(sizes)
        terms, losses, norm, l0, dead, codes = (part.tolist() for part in flat)
        counts = map(int, codes)
        calls = [
            [
                Call(_layout(capacity), n_streams * tokens, next(counts))
                for capacity, n_streams in zip(capacities, self._n_streams, strict=True)
            ]
            for tokens, *capacities in self._host_rows
        ]
        named = dict(zip(self._names, terms, strict=True))
        if l0:  # over tokens, as by layer; other terms are averaged over sequences
            named["l0"] = sum(l0) / len(l0)
        return StepReport(named, losses, norm[0], l0, [int(n) for n in dead], calls)


class DeadFeatures:
    """Counters of the training tokens since each feature last fired.

    A feature is dead if its counter has reached the window.

    Args:
        shape: (L, F); (0,) for a baseline.
        window: number of tokens.
        device: device of the counters.
    """

    def __init__(self, shape: tuple[int, ...], window: int, device: torch.device) -> None:
        self.window = window
        self.since_LF = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, fired_LF: Tensor, tokens: int, counted: Tensor) -> None:
        """Add a step's ``tokens`` to the counters if ``counted``, a 0-d bool on the device."""
        after = (self.since_LF + tokens).masked_fill(fired_LF, 0)
        self.since_LF = torch.where(counted, after, self.since_LF)

    def per_layer(self) -> Tensor:
        """Return int64 [L], the dead features of each layer; [0] for a baseline."""
        return (self.since_LF >= self.window).sum(-1) if len(self.since_LF) else self.since_LF


def evaluation_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of an evaluation in ``metrics.jsonl``.

    Feature densities (share of tokens on which a feature fires) become a histogram per layer.
    The counts of held-out data are renamed to ``eval_tokens`` and ``eval_sequences``, since
    ``tokens`` are training tokens in every record.
    """
    record = {key: value for key, value in values.items() if key != "feature_density"}
    for name in ("tokens", "sequences"):
        if name in record:
            record[f"eval_{name}"] = record.pop(name)
    if "feature_density" in values:
        record["feature_density_histogram"] = density_histogram(values["feature_density"])
    return record


def density_histogram(density: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return ``{"log10_edges": [n + 1], "counts": [L][n]}``, without features that never fired.

    Args:
        density: per layer and feature, the share of tokens on which the feature fired.

    Example:
        >>> histogram = density_histogram([[0.0, 0.01, 0.01]])
        >>> edges, counts = histogram["log10_edges"], histogram["counts"]
        >>> len(edges) - len(counts[0]), edges[counts[0].index(2)]
        (1, -2.0)
    """
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    counts = []
    for shares in density:
        fired = torch.tensor([share for share in shares if share > 0], dtype=torch.float64)
        low, high = DENSITY_EDGES[0], DENSITY_EDGES[-1]
        histogram, _ = torch.histogram(fired.log10().clamp(low, high), edges)
        counts.append([int(n) for n in histogram.tolist()])
    return {"log10_edges": DENSITY_EDGES, "counts": counts}


def _stacked(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Return the tensors as ``[L, ...]``; ``[0]`` for a baseline, which has none."""
    return torch.stack(tensors) if tensors else like.new_zeros(0)


def _capacity(plan: CodeLayout | None) -> int:
    """Return the capacity of a call's code buffers; -1 if it is unbounded."""
    return -1 if plan is None or plan.dense or plan.capacity is None else plan.capacity


def _layout(capacity: int) -> CodeLayout | None:
    """Return a layout with the capacity that :func:`_capacity` returned."""
    return None if capacity < 0 else CodeLayout(False, capacity)
