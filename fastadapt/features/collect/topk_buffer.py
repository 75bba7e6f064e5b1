"""The k best activations of every unit, met in any order: one routine for all that is kept.

U units, k kept of each, W tokens of a window, m candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

POSITION_BITS = 32
RANKED = ("key", "place", "value", "slot")
FIELDS = (*RANKED, "window")


def place_of(text: Tensor, position: Tensor) -> Tensor:
    """int64: text and position as one number, which sorts as they do."""
    return (text << POSITION_BITS) | position


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[index]``, along its first dimension; on a CPU several times as fast."""
    return tensor.index_select(0, index)


def best(unit: Tensor, key: Tensor, place: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which candidates are among the k best of their unit, and the rank of each there.

    The best have the largest keys; of equal ones, the lowest places.

    Args:
        unit, key, place: int64 ``[m]``, in any order.

    Returns:
        Indices into them, sorted by unit and rank, and the ranks: int64, up to k of each unit.
    """
    if bool((place.diff() > 0).all()):  # as the codes of a batch come
        order = key.argsort(descending=True, stable=True)
    else:
        order = place.argsort(stable=True)
        order = rows(order, rows(key, order).argsort(descending=True, stable=True))
    order = rows(order, rows(unit, order).int().argsort(stable=True))
    units = rows(unit, order)
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
    """The k best so far, best first: ``[U, k]`` each, and their windows, ``[U, k, W]``.

    The key is -1 where there is none yet. Windows stay where they were first put, at the ``slot``
    of their activation: ranks change often, and windows are most of what is kept.
    """

    key: Tensor
    place: Tensor
    value: Tensor
    slot: Tensor
    window: Tensor

    @classmethod
    def empty(cls, n_units: int, k: int, width: int, device: torch.device) -> Kept:
        """Nothing yet."""
        key = torch.full((n_units, k), -1, dtype=torch.int64, device=device)
        value = torch.zeros(n_units, k, device=device)
        return cls(key, key.clone(), value, key.clone(), value.new_zeros(n_units, k, width))

    @property
    def k(self) -> int:
        """Kept of each unit."""
        return self.key.shape[1]

    def admits(self, unit: Tensor, key: Tensor) -> Tensor:
        """Indices of those that may be among the k best; after some batches these are few."""
        if self.k == 0:
            return unit.new_zeros(0)
        return (key >= rows(self.key[:, -1], unit)).nonzero().flatten()

    def merge(self, new: Candidates) -> None:
        """Take in candidates, each of which is met once."""
        if len(new.unit) == 0 or self.k == 0:
            return
        met = torch.zeros(len(self.key), dtype=torch.bool, device=new.unit.device)
        met[new.unit] = True
        touched, of = met.nonzero().flatten(), rows(met.cumsum(0) - 1, new.unit)
        order, among_new = best(of, new.key, new.place, self.k)
        of = rows(of, order)
        old = {name: rows(getattr(self, name), touched) for name in RANKED}
        key, place = rows(new.key, order)[:, None], rows(new.place, order)[:, None]
        keys, places = rows(old["key"], of), rows(old["place"], of)
        better = (keys > key) | ((keys == key) & (places < place))
        above = better.sum(1)
        rank = above + among_new
        # Each new one moves those behind it by one.
        moves = torch.zeros(len(touched), self.k + 1, dtype=torch.int64, device=of.device)
        moves.view(-1).index_add_(0, of * (self.k + 1) + above, torch.ones_like(of))
        moved = torch.arange(self.k, device=of.device) + moves.cumsum(1)[:, :-1]
        row, column = ((moved < self.k) & (old["key"] >= 0)).nonzero(as_tuple=True)
        at = row * self.k + column
        behind = rows(moved.flatten(), at)
        enters = (rank < self.k).nonzero().flatten()
        of, rank, source = (rows(t, enters) for t in (of, rank, order))
        used = torch.zeros_like(old["key"], dtype=torch.bool)
        used[row, rows(old["slot"].flatten(), at)] = True
        free_of, free = (~used).nonzero(as_tuple=True)
        nth = torch.arange(len(of), device=of.device) - torch.searchsorted(of, of)
        slot = rows(free, torch.searchsorted(free_of, of) + nth)
        entering = {"key": new.key, "place": new.place, "value": new.value}
        for name, before in old.items():
            ranked = torch.zeros_like(before) if name == "value" else torch.full_like(before, -1)
            ranked[row, behind] = rows(before.flatten(), at)
            ranked[of, rank] = slot if name == "slot" else rows(entering[name], source)
            getattr(self, name)[touched] = ranked
        self.window[rows(touched, of), slot] = rows(new.window, source)

    def candidates(self, units: Tensor) -> Candidates:
        """What is kept of some units, by unit and rank; may be taken in by another one."""
        there = self.key[units] >= 0
        unit = units[:, None].expand_as(there)[there]
        key, place, value, slot = (getattr(self, name)[units][there] for name in RANKED)
        return Candidates(unit, key, place, value, self.window[unit, slot])

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what :meth:`tensors` gave."""
        for name in FIELDS:
            getattr(self, name).copy_(tensors[name])
