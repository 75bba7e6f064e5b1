"""The top k activations of every feature or neuron, in whatever order activations come.

U units, k entries per unit, W tokens per window, m candidates.
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
    """Pack text and position into one int64 that sorts by text, then position."""
    return (text << POSITION_BITS) | position


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return ``tensor[index]`` along the first dimension; several times faster on a CPU."""
    return tensor.index_select(0, index)


def topk_per_group(group: Tensor, key: Tensor, place: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k items with the largest keys of each group; of equal keys, the lowest places.

    Args:
        group, key, place: int64 ``[m]``, in any order.

    Returns:
        Indices of the items, sorted by group and rank, and their ranks from 0: int64 each.
    """
    if bool((place.diff() > 0).all()):  # the codes of a batch come sorted by place
        order = key.argsort(descending=True, stable=True)
    else:
        order = place.argsort(stable=True)
        order = rows(order, rows(key, order).argsort(descending=True, stable=True))
    order = rows(order, rows(group, order).int().argsort(stable=True))
    groups = rows(group, order)
    # searchsorted(groups, groups) is where each item's group starts.
    rank = torch.arange(len(groups), device=group.device) - torch.searchsorted(groups, groups)
    is_top = rank < k
    return order[is_top], rank[is_top]


@dataclass(frozen=True)
class Candidates:
    """Activations offered to a buffer, in any order.

    Attributes:
        unit: int64 ``[m]``.
        key: int64 ``[m]``, 0 or more; larger keys rank first.
        place: int64 ``[m]``, see :func:`place_of`.
        value: float32 ``[m]``.
        window: float32 ``[m, W]``, the unit's activation at each token around; 0 outside the text.
    """

    unit: Tensor
    key: Tensor
    place: Tensor
    value: Tensor
    window: Tensor


@dataclass(frozen=True)
class TopKBuffer:
    """The top k activations of each of U units so far: ``[U, k]``, with windows ``[U, k, W]``.

    Empty entries have key -1. An entry's window stays at its ``slot`` when the entry changes rank:
    ranks change often, and windows are most of the memory.
    """

    key: Tensor
    place: Tensor
    value: Tensor
    slot: Tensor
    window: Tensor

    @classmethod
    def empty(cls, n_units: int, k: int, width: int, device: torch.device) -> TopKBuffer:
        """Return a buffer for U units that has no entries."""
        key = torch.full((n_units, k), -1, dtype=torch.int64, device=device)
        value = torch.zeros(n_units, k, device=device)
        return cls(key, key.clone(), value, key.clone(), value.new_zeros(n_units, k, width))

    @property
    def k(self) -> int:
        """Number of entries per unit."""
        return self.key.shape[1]

    def may_enter(self, unit: Tensor, key: Tensor) -> Tensor:
        """Return the indices of candidates whose key reaches the lowest of their unit's entries."""
        if self.k == 0:
            return unit.new_zeros(0)
        return (key >= rows(self.key[:, -1], unit)).nonzero().flatten()

    def merge(self, new: Candidates) -> None:
        """Insert candidates, none of which the buffer has seen before."""
        if len(new.unit) == 0 or self.k == 0:
            return
        # Only units with a candidate are read and written; ``row`` numbers these from 0.
        is_touched = torch.zeros(len(self.key), dtype=torch.bool, device=new.unit.device)
        is_touched[new.unit] = True
        touched = is_touched.nonzero().flatten()
        row = rows(is_touched.cumsum(0) - 1, new.unit)
        order, rank_in_new = topk_per_group(row, new.key, new.place, self.k)
        row = rows(row, order)
        old = {name: rows(getattr(self, name), touched) for name in RANKED}
        # The rank of a candidate: its rank among the candidates plus the old entries ahead of it.
        key, place = rows(new.key, order)[:, None], rows(new.place, order)[:, None]
        old_key, old_place = rows(old["key"], row), rows(old["place"], row)
        n_ahead = ((old_key > key) | ((old_key == key) & (old_place < place))).sum(1)
        rank = n_ahead + rank_in_new
        # A candidate with n old entries ahead moves the old entries of rank n and more back by 1,
        # so the cumulative count over n is how far the entry of rank n moves. Column k counts the
        # candidates that move none.
        inserted = torch.zeros(len(touched), self.k + 1, dtype=torch.int64, device=row.device)
        inserted.view(-1).index_add_(0, row * (self.k + 1) + n_ahead, torch.ones_like(row))
        new_rank = torch.arange(self.k, device=row.device) + inserted.cumsum(1)[:, :-1]
        stays = (new_rank < self.k) & (old["key"] >= 0)
        old_row, old_rank = stays.nonzero(as_tuple=True)
        old_index = old_row * self.k + old_rank  # into [touched, k], flattened
        moved_rank = rows(new_rank.flatten(), old_index)
        enters = (rank < self.k).nonzero().flatten()
        row, rank, source = (rows(t, enters) for t in (row, rank, order))
        # The nth candidate that enters a row takes the row's nth free slot. ``row`` and
        # ``free_row`` are sorted, so searchsorted gives where a row's run starts in each.
        is_used = torch.zeros_like(old["key"], dtype=torch.bool)
        is_used[old_row, rows(old["slot"].flatten(), old_index)] = True
        free_row, free_slot = (~is_used).nonzero(as_tuple=True)
        nth = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        slot = rows(free_slot, torch.searchsorted(free_row, row) + nth)
        entering = {"key": new.key, "place": new.place, "value": new.value}
        for name, before in old.items():
            ranked = torch.zeros_like(before) if name == "value" else torch.full_like(before, -1)
            ranked[old_row, moved_rank] = rows(before.flatten(), old_index)
            ranked[row, rank] = slot if name == "slot" else rows(entering[name], source)
            getattr(self, name)[touched] = ranked
        self.window[rows(touched, row), slot] = rows(new.window, source)

    def candidates(self, units: Tensor) -> Candidates:
        """Return the entries of ``units``, by unit and rank, as candidates for another buffer."""
        is_entry = self.key[units] >= 0
        unit = units[:, None].expand_as(is_entry)[is_entry]
        key, place, value, slot = (getattr(self, name)[units][is_entry] for name in RANKED)
        return Candidates(unit, key, place, value, self.window[unit, slot])

    def tensors(self) -> dict[str, Tensor]:
        """Return the buffer's entries as tensors by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the state returned by :meth:`tensors`, in place."""
        for name in FIELDS:
            getattr(self, name).copy_(tensors[name])
