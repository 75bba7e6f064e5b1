"""Estimates of how many codes each layer of a step will have, and detection of overflows.

On a GPU the adapter's call gets a code layout beforehand: whether codes or dense products are
cheaper, and how long the code buffers are. To look at the number itself, the call would have to
wait for the device. Layouts follow the counts of the step before, which the loop reads anyway with
the loss, in the one copy at a step's end. That copy also shows whether a layout was too small,
before anything is applied, so that no flag has to reach the optimiser on the device. Such a step is
repeated without layouts: each call then looks for itself, and nothing can overflow.

Counts are a function of weights and data, and are saved with them: a resumed run uses the layouts
that the uninterrupted run would have used, and so has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastadapt.kernels.transcoder import CodeLayout


class Call(NamedTuple):
    """One layer's adapter call in one micro-batch: its layout and its counts.

    Attributes:
        plan: layout of the codes; None where the op looked at their number itself.
        tokens: of all streams in the call, without padding.
        codes: number of codes, also where the buffers were too short.
    """

    plan: CodeLayout | None
    tokens: int
    codes: int

    @property
    def overflows(self) -> bool:
        """Whether the buffers were too short: neither outputs nor gradients are valid then."""
        if self.plan is None or self.plan.dense or self.plan.capacity is None:
            return False
        return self.codes > self.plan.capacity


def takes_plans(implementation: str, device_type: str) -> bool:
    """Whether this implementation of the transcoder, on this device, should be given plans."""
    on_device = device_type == "cuda" and implementation == "auto"
    return on_device or implementation.startswith("triton")


def overflow(calls: Sequence[Sequence[Call]]) -> dict[str, list[int]]:
    """Return what did not fit, of ``calls[micro-batch][layer]``; empty if the step is valid.

    Returns:
        ``layers, capacities, codes``, an entry for the first layer of each micro-batch whose codes
        did not fit. Layers behind it saw wrong hidden states: their counts mean nothing.
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
    """Codes to expect of a step: the counts of the last step that was applied.

    A step that was not applied changes nothing: broken data say nothing about the next step.

    Args:
        enabled: whether the adapters' kernel takes layouts; if not, no step is given any.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        #: Codes per token of each layer, to plan its calls with; None for no plans.
        self.expected: list[float] | None = None

    def applied(self, calls: Sequence[Sequence[Call]]) -> None:
        """Take the counts of a step, ``calls[micro-batch][layer]``: of each layer the largest."""
        if self.enabled:
            by_layer = zip(*calls, strict=True)
            self.expected = [max(c.codes / max(c.tokens, 1) for c in layer) for layer in by_layer]

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"codes_per_token": self.expected}

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave; a checkpoint from before there were plans has none."""
        self.expected = scalars.get("codes_per_token")
