"""How many codes a step may expect of each layer, and what happens where there are more.

On a GPU the adapter's call is told beforehand, by a plan, whether codes or dense products are
cheaper and how long the code buffers are: to look at the number itself it would have to wait for
the device. Plans follow the counts of the step before, which the loop reads anyway with the loss,
in the one copy at a step's end; there it also sees whether a plan was too small, before anything is
applied, so that no flag has to reach the optimiser on the device. Such a step is made once more,
without plans: each call then looks for itself, and nothing can overflow.

Counts are a function of weights and data, and are saved with them: a resumed run makes the plans
that the run would have made, and so the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastadapt.kernels.transcoder import Plan


class Call(NamedTuple):
    """A layer's call in one micro-batch: what it was told and what it found.

    Attributes:
        plan: what it was given; None where the op looked for itself, or nothing could be too short.
        tokens: of all streams in the call, without padding.
        codes: how many there were, also where the buffers were too short.
    """

    plan: Plan | None
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
    """What did not fit, of ``calls[micro-batch][layer]``; empty if the step is valid.

    Returns:
        ``layers, capacities, codes``, an entry for the first layer of each micro-batch whose codes
        did not fit. Layers behind it saw wrong hidden states: their counts tell nothing.
    """
    found: list[tuple[int, Call, Plan]] = []
    for layers in calls:
        short = ((i, c, c.plan) for i, c in enumerate(layers) if c.plan and c.overflows)
        found += list(short)[:1]
    if not found:
        return {}
    return {
        "layers": [layer for layer, _, _ in found],
        "capacities": [plan.capacity or 0 for _, _, plan in found],
        "codes": [call.codes for _, call, _ in found],
    }


class Planner:
    """What to expect of a step: the counts of the last step that was applied.

    A step that was not applied leaves no trace: broken data tell nothing of the next.

    Args:
        enabled: whether the adapters' kernel takes plans; if not, no step is given any.
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
