"""The k best activations of every unit, met in any order: one routine for all that is kept.

U units, k kept of each, W tokens of a window, m candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

POSITION_BITS = 32
FIELDS = ("key", "place", "value", "window")


def place_of(text: Tensor, position: Tensor) -> Tensor:
    """int64: text and position as one number, which sorts as they do."""
    return (text << POSITION_BITS) | position


def best(unit: Tensor, key: Tensor, place: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which candidates are among the k best of their unit, and the rank of each there.

    The best have the largest keys; of equal ones, the lowest places.

    Args:
        unit, key, place: int64 ``[m]``, in any order.

    Returns:
        Indices into them, sorted by unit and rank, and the ranks: int64, up to k of each unit.
    """
    order = place.argsort(stable=True)
    order = order[key[order].argsort(descending=True, stable=True)]
    order = order[unit[order].argsort(stable=True)]
    units = unit[order]
    rank = torch.arange(len(units), device=unit.device) - torch.searchsorted(units, units)
    kept = rank < k
    return order[kept], rank[kept]


@dataclass(frozen=True)
class Candidates:
    """Activations that may be kept, in any order.

    Attributes:
        unit: int64 ``[m]``.
        key: int64 ``[m]``, 0 or more: the best are those of the largest.
        place: int64 ``[m]``, see :func:`place_of`.
        value: float32 ``[m]``.
        window: float32 ``[m, W]``: this unit's activation at each token around; 0 outside the text.
    """

    unit: Tensor
    key: Tensor
    place: Tensor
    value: Tensor
    window: Tensor


@dataclass(frozen=True)
class Kept:
    """The k best so far, best first: ``[U, k]`` each, ``window`` ``[U, k, W]``.

    The key is -1 where there is none yet.
    """

    key: Tensor
    place: Tensor
    value: Tensor
    window: Tensor

    @classmethod
    def empty(cls, n_units: int, k: int, width: int, device: torch.device) -> Kept:
        """Nothing yet."""
        key = torch.full((n_units, k), -1, dtype=torch.int64, device=device)
        value = torch.zeros(n_units, k, device=device)
        return cls(key, key.clone(), value, value.new_zeros(n_units, k, width))

    @property
    def k(self) -> int:
        """Kept of each unit."""
        return self.key.shape[1]

    def admits(self, unit: Tensor, key: Tensor) -> Tensor:
        """Indices of those that may be among the k best; after some batches these are few."""
        if self.k == 0:
            return unit.new_zeros(0)
        return (key >= self.key[:, -1][unit]).nonzero().flatten()

    def merge(self, new: Candidates) -> None:
        """Take in candidates, each of which is met once."""
        if len(new.unit) == 0 or self.k == 0:
            return
        touched, which = new.unit.unique(return_inverse=True)
        own = torch.arange(len(touched), device=which.device).repeat_interleave(self.k)
        old = {name: getattr(self, name)[touched].flatten(0, 1) for name in FIELDS}
        there = (old["key"] >= 0).nonzero().flatten()
        unit = torch.cat([own[there], which])
        joined = {name: torch.cat([old[name][there], getattr(new, name)]) for name in FIELDS}
        order, rank = best(unit, joined["key"], joined["place"], self.k)
        row = touched[unit[order]]
        for name in FIELDS:  # a unit keeps as many as before, or more: no rank is left over
            getattr(self, name)[row, rank] = joined[name][order]

    def candidates(self, units: Tensor) -> Candidates:
        """What is kept of some units, as candidates for another one's."""
        there = self.key[units] >= 0
        unit = units[:, None].expand_as(there)[there]
        return Candidates(unit, *(getattr(self, name)[units][there] for name in FIELDS))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what :meth:`tensors` gave."""
        for name in FIELDS:
            getattr(self, name).copy_(tensors[name])
