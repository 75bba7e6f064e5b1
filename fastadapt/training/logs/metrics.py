"""What a step tells: terms of the loss, L0, dead features; gathered on the device, read at once.

L layers, F features.
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

#: Edges of the histogram of feature density: log10 of the share of tokens on which a feature fires.
DENSITY_EDGES = [-7 + i / 4 for i in range(29)]


_STATISTICS = ("n_active", "n_tokens", "n_codes", "min_active")  # of a call; 0-d each


class StepReport(NamedTuple):
    """A step's numbers, on the host.

    Attributes:
        terms: the objective's metrics, averaged over the step's sequences.
        losses: the loss of each micro-batch.
        grad_norm: of the summed gradient, before clipping.
        l0_per_layer: active features per token; empty where what is trained has none.
        dead_per_layer: features that have not fired within the dead window; likewise.
        calls: every call of a transcoder: ``[micro-batch][layer]``.
    """

    terms: dict[str, float]
    losses: list[float]
    grad_norm: float
    l0_per_layer: list[float]
    dead_per_layer: list[int]
    calls: list[list[Call]]

    @property
    def finite(self) -> bool:
        """Whether the losses and the gradient are numbers that a step may be made of."""
        return all(map(math.isfinite, (self.grad_norm, *self.losses)))

    @property
    def broken(self) -> list[int]:
        """The micro-batches whose loss is not finite."""
        return [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]


class StepGatherer:
    """Collects the micro-batches of one optimiser step without waiting for the device.

    Every rank adds its share of them, then all call :meth:`combine`; from there on each has the
    whole step, in the order in which one process would have gone through it.

    Args:
        ranks: those that share the step.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._names: list[str] = []
        self._n_streams: list[int] = []  # [L]
        self._rows: list[Tensor] = []  # per micro-batch: terms, loss, whether it fits, statistics
        self._known: list[list[int]] = []  # tokens, capacities [L], of those added here
        self._fired: list[Tensor] = []  # bool [L, F]

    def add(self, out: ObjectiveOutput, weight: float, tokens: int) -> None:
        """Take a micro-batch of ``tokens`` tokens, the share ``weight`` of the step's sequences.

        One of weight 0 is a repeat that does not count
        (:meth:`fastadapt.distributed.ranks.Ranks.shard`).
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
        self._known.append([tokens, *capacities])
        self._fired.append(_stacked([s.fired for s in stats], loss).bool())

    def combine(self, n_micro_batches: int) -> None:
        """Put the shares of all ranks together: ``n_micro_batches`` in all."""
        n_layers = len(self._n_streams)
        sizes = [len(self._names), 1, 1, *(n_layers for _ in _STATISTICS)]
        rows = self._ranks.interleave(torch.stack(self._rows))[:n_micro_batches]
        self._terms, self._fits, self._loss, *statistics = rows.split(sizes, dim=1)
        self._statistics = dict(zip(_STATISTICS, statistics, strict=True))
        self._known = self._ranks.interleave(torch.tensor(self._known))[:n_micro_batches].tolist()

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return sum(tokens for tokens, *_ in self._known)

    def fired(self) -> Tensor:
        """Bool [L, F]: features that fired on some token of the step; [0] where there are none."""
        return self._ranks.all_reduce_or(torch.stack(self._fired).any(0))

    def valid(self, grad_norm: Tensor) -> Tensor:
        """0-d bool on the device: :attr:`StepReport.finite`, and no call overflows its plan."""
        return self._fits.bool().all() & grad_norm.isfinite()

    def min_active(self) -> Tensor:
        """[L]: smallest active value, averaged over micro-batches; NaN where nothing fired."""
        return self._statistics["min_active"].nanmean(0)

    def report(self, grad_norm: Tensor, dead_L: Tensor) -> StepReport:
        """Read everything in one copy from the device."""
        of = self._statistics
        parts = [
            self._terms.sum(0),
            self._loss,
            grad_norm,
            of["n_active"].sum(0) / of["n_tokens"].sum(0).clamp(min=1),
            dead_L,
            of["n_codes"],
        ]
        sizes = [part.numel() for part in parts]
        flat = torch.cat([part.double().flatten() for part in parts]).cpu().split(sizes)
        terms, losses, norm, l0, dead, codes = (part.tolist() for part in flat)
        counts = map(int, codes)
        calls = [
            [
                Call(_plan(capacity), n_streams * tokens, next(counts))
                for capacity, n_streams in zip(capacities, self._n_streams, strict=True)
            ]
            for tokens, *capacities in self._known
        ]
        named = dict(zip(self._names, terms, strict=True))
        return StepReport(named, losses, norm[0], l0, [int(n) for n in dead], calls)


class DeadFeatures:
    """Training tokens since each feature last fired; dead are those beyond the window.

    Args:
        shape: (L, F); (0,) where what is trained has no features.
        window: in tokens.
        device: of the counters.
    """

    def __init__(self, shape: tuple[int, ...], window: int, device: torch.device) -> None:
        self.window = window
        self.since_LF = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, fired_LF: Tensor, tokens: int, counted: Tensor) -> None:
        """Count a step of ``tokens`` tokens, unless ``counted`` (0-d bool) is false."""
        after = (self.since_LF + tokens).masked_fill(fired_LF, 0)
        self.since_LF = torch.where(counted, after, self.since_LF)

    def per_layer(self) -> Tensor:
        """int64 [L]: dead features per layer."""
        return (self.since_LF >= self.window).sum(-1) if len(self.since_LF) else self.since_LF


def evaluation_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation goes into ``metrics.jsonl``.

    The density of single features becomes a histogram per layer, and the counts of held-out data
    get names of their own, since ``tokens`` means training tokens in every record.
    """
    record = {key: value for key, value in values.items() if key != "feature_density"}
    for name in ("tokens", "sequences"):
        if name in record:
            record[f"eval_{name}"] = record.pop(name)
    if "feature_density" in values:
        record["feature_density_histogram"] = density_histogram(values["feature_density"])
    return record


def density_histogram(density: Sequence[Sequence[float]]) -> dict[str, Any]:
    """``{"log10_edges": [n + 1], "counts": [L][n]}``; features that never fired are not in it."""
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    counts = []
    for shares in density:
        fired = torch.tensor([share for share in shares if share > 0], dtype=torch.float64)
        low, high = DENSITY_EDGES[0], DENSITY_EDGES[-1]
        histogram, _ = torch.histogram(fired.log10().clamp(low, high), edges)
        counts.append([int(n) for n in histogram.tolist()])
    return {"log10_edges": DENSITY_EDGES, "counts": counts}


def _stacked(tensors: list[Tensor], like: Tensor) -> Tensor:
    """``[L, ...]``; of no layers, where nothing that is trained has features, ``[0]``."""
    return torch.stack(tensors) if tensors else like.new_zeros(0)


def _capacity(plan: CodeLayout | None) -> int:
    """Of the buffers of a call; -1 where they are as long as they have to be."""
    return -1 if plan is None or plan.dense or plan.capacity is None else plan.capacity


def _plan(capacity: int) -> CodeLayout | None:
    """What of a call's plan is still of interest: whether it was too small."""
    return None if capacity < 0 else CodeLayout(False, capacity)
