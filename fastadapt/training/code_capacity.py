"""Estimates of the number of codes in each layer of a step, and detection of overflows.

On a GPU the adapter's call gets a code layout in advance: the choice between codes and dense
products, and the length of the code buffers. Reading the number of codes inside the call would
wait for the device. Layouts follow the counts of the previous step, which the loop copies from the
device with the loss at the end of the step. The same copy shows whether a layout was too small,
before the update is applied. Such a step is repeated without layouts: each call then reads its
number of codes, and no buffer can overflow.

Counts depend on weights and data only and are saved in checkpoints. A resumed run therefore uses
the layouts of the uninterrupted run, and has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastadapt.kernels.transcoder import CodeLayout


class Call(NamedTuple):
    """Adapter call of one layer in one micro-batch: its layout and its counts.

    Attributes:
        plan: layout of the codes; None if the op read their number itself.
        tokens: tokens of all streams in the call, without padding.
        codes: number of codes, which may exceed the buffers.
    """

    plan: CodeLayout | None
    tokens: int
    codes: int

    @property
    def overflows(self) -> bool:
        """Whether the buffers were too short, which makes outputs and gradients invalid."""
        if self.plan is None or self.plan.dense or self.plan.capacity is None:
            return False
        return self.codes > self.plan.capacity


def takes_plans(implementation: str, device_type: str) -> bool:
    """Return whether an implementation of the transcoder takes code layouts on this device."""
    on_device = device_type == "cuda" and implementation == "auto"
    return on_device or implementation.startswith("triton")


def overflow(calls: Sequence[Sequence[Call]]) -> dict[str, list[int]]:
    """Return the overflows of ``calls[micro-batch][layer]``; empty if the step is valid.

    Returns:
        Lists ``layers, capacities, codes`` with an entry for each micro-batch that overflowed: its
        first layer whose codes did not fit. Later layers got wrong hidden states, so their counts
        are meaningless.
    """
    first: list[tuple[int, Call, CodeLayout]] = []
    for layers in calls:
        short = ((i, c, c.plan) for i, c in enumerate(layers) if c.plan and c.overflows)
        first += list(short)[:1]
    if not first:
        return {}
    return {
        "layers": [layer for layer, _, _ in first],
        "capacities": [plan.capacity or 0 for _, _, plan in first],
        "codes": [call.codes for _, call, _ in first],
    }


class CapacityEstimator:
    """Estimates the number of codes in the next step: that of the last applied step.

    A skipped step does not count, since its losses or gradients were not finite.

    Args:
        enabled: whether the adapters' kernel takes layouts.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        #: Expected codes per token of each layer; None: calls get no layouts.
        self.expected: list[float] | None = None

    def applied(self, calls: Sequence[Sequence[Call]]) -> None:
        """Record each layer's largest count of an applied step, ``calls[micro-batch][layer]``."""
        if self.enabled:
            by_layer = zip(*calls, strict=True)
            self.expected = [max(c.codes / max(c.tokens, 1) for c in layer) for layer in by_layer]

    def state(self) -> dict[str, Any]:
        """Return JSON values for a checkpoint."""
        return {"codes_per_token": self.expected}

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Restore the values of :meth:`state`, which checkpoints of older versions lack."""
        self.expected = scalars.get("codes_per_token")
