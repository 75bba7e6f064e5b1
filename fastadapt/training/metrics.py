"""What a step tells: terms of the loss, L0, dead features; gathered on the device, read at once.

L layers, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.kernels.transcoder import TranscoderStats
from fastadapt.objective import AdapterCall, ObjectiveOutput
from fastadapt.training.planner import Call

#: Edges of the histogram of feature density: log10 of the share of tokens on which a feature fires.
DENSITY_EDGES = [-7 + i / 4 for i in range(29)]


class StepReport(NamedTuple):
    """A step's numbers, on the host.

    Attributes:
        terms: the objective's metrics, averaged over the step's sequences.
        losses: the loss of each micro-batch.
        grad_norm: of the summed gradient, before clipping.
        l0_per_layer: active features per token.
        dead_per_layer: features that have not fired within the dead window.
        calls: every call of an adapter: ``[micro-batch][layer]``.
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
    """Collects the micro-batches of one optimiser step without waiting for the device."""

    def __init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._calls: list[list[AdapterCall]] = []
        self._tokens: list[int] = []

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return sum(self._tokens)

    def add(self, out: ObjectiveOutput, weight: float, tokens: int) -> None:
        """Take a micro-batch of ``tokens`` tokens, the share ``weight`` of the step's sequences."""
        for name, value in out.metrics.items():
            term = value * weight
            self._terms[name] = self._terms[name] + term if name in self._terms else term
        self._losses.append(out.metrics["loss"])
        self._calls.append(out.calls)
        self._tokens.append(tokens)

    def fired(self) -> Tensor:
        """Bool [L, F]: features that fired on some token of the step."""
        return torch.stack([_any([s.fired for s in layer]) for layer in self._layers()])

    def valid(self, grad_norm: Tensor) -> Tensor:
        """0-d bool on the device: :attr:`StepReport.finite`, and no call overflows its plan."""
        finite = torch.stack([*self._losses, grad_norm]).isfinite().all()
        fits = [
            call.stats.n_codes <= call.plan.capacity
            for layers in self._calls
            for call in layers
            if call.plan is not None and not call.plan.dense and call.plan.capacity is not None
        ]
        return torch.stack([finite, *fits]).all()

    def min_active(self) -> Tensor:
        """[L]: smallest active value, averaged over micro-batches; NaN where nothing fired."""
        return torch.stack(
            [torch.stack([s.min_active for s in layer]).nanmean() for layer in self._layers()]
        )

    def report(self, grad_norm: Tensor, dead_L: Tensor) -> StepReport:
        """Read everything in one copy from the device."""
        layers = self._layers()
        active = torch.stack([torch.stack([s.n_active for s in layer]).sum() for layer in layers])
        tokens = torch.stack([torch.stack([s.n_tokens for s in layer]).sum() for layer in layers])
        codes = torch.stack([c.stats.n_codes for layers in self._calls for c in layers])
        parts = [
            torch.stack(list(self._terms.values())),
            torch.stack(self._losses),
            grad_norm.reshape(1),
            active / tokens.clamp(min=1),
            dead_L,
            codes,
        ]
        sizes = [part.numel() for part in parts]
        flat = torch.cat([part.double() for part in parts]).cpu().split(sizes)
        terms, losses, norm, l0, dead, found = (part.tolist() for part in flat)
        named = dict(zip(self._terms, terms, strict=True))
        counts = map(int, found)
        calls = [
            [Call(call.plan, call.n_streams * tokens, next(counts)) for call in layers]
            for layers, tokens in zip(self._calls, self._tokens, strict=True)
        ]
        return StepReport(named, losses, norm[0], l0, [int(n) for n in dead], calls)

    def _layers(self) -> list[tuple[TranscoderStats, ...]]:
        return [tuple(c.stats for c in layer) for layer in zip(*self._calls, strict=True)]


class DeadFeatures:
    """Training tokens since each feature last fired; dead are those beyond the window.

    Args:
        n_layers, n_features: L and F.
        window: in tokens.
        device: of the counters.
    """

    def __init__(self, n_layers: int, n_features: int, window: int, device: torch.device) -> None:
        self.window = window
        self.since_LF = torch.zeros(n_layers, n_features, dtype=torch.int64, device=device)

    def update(self, fired_LF: Tensor, tokens: int, counted: Tensor) -> None:
        """Count a step of ``tokens`` tokens, unless ``counted`` (0-d bool) is false."""
        after = (self.since_LF + tokens).masked_fill(fired_LF, 0)
        self.since_LF = torch.where(counted, after, self.since_LF)

    def per_layer(self) -> Tensor:
        """int64 [L]: dead features per layer."""
        return (self.since_LF >= self.window).sum(1)


def evaluation_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation goes into ``metrics.jsonl``.

    The density of single features becomes a histogram per layer, and the counts of held-out data
    get names of their own, since ``tokens`` means training tokens in every record.
    """
    record = {key: value for key, value in values.items() if key != "feature_density"}
    for name in ("tokens", "sequences"):
        if name in record:
            record[f"eval_{name}"] = record.pop(name)
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


def _any(flags: Sequence[Tensor]) -> Tensor:
    return flags[0] if len(flags) == 1 else torch.stack(list(flags)).any(0)
