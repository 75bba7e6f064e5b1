"""Sums of numbers that do not depend on the order of the terms, as two integers per sum.

A number is split into a multiple of 2**-16 and a remainder of 0 to 2**-16 - 2**-48, in multiples of
2**-48. Both parts are integers that float64 and int64 add exactly, up to a sum of 1e11 in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIGH, LOW = 2.0**16, 2.0**32


def add(sums: Tensor, values: Tensor, group: Tensor | None = None) -> None:
    """Add ``values`` to sums, in place.

    Args:
        sums: int64 ``[G, 2]``.
        values: finite: ``[G]``, or ``[C]`` with a group each.
        group: int64 ``[C]``, the sum that each value is added to.
    """
    scaled = values.double() * HIGH
    high = scaled.floor()
    for part, whole in enumerate((high, ((scaled - high) * LOW).floor())):
        if group is not None:
            whole = torch.bincount(group, whole, minlength=len(sums))
        sums[:, part] += whole.long()


def totals(sums: Tensor) -> Tensor:
    """Return the sums ``[..., 2]`` as float64 ``[...]``.

    Example:
        >>> sums = torch.zeros(2, 2, dtype=torch.int64)
        >>> add(sums, torch.tensor([0.5, -3.25, 2.0]), torch.tensor([1, 0, 1]))
        >>> totals(sums).tolist()
        [-3.25, 2.5]
    """
    high, low = sums.double().unbind(-1)
    return (high + low / LOW) / HIGH
