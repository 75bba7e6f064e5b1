"""Ask the judge about the stored units of every organism, and count.

A difference is *planted* if the target says its words at its places and the base does not; it is
*in the MLPs* if the hybrid, which has the base's MLPs, does not say them. What the hybrid says no
method can find in MLPs, and adapters read nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reproduce.planted.differences import KINDS
from reproduce.planted.intervals import gap, share
from reproduce.planted.judge import Judge, Unit
from reproduce.planted.measure import MOST, DifferenceRow, Measured, StoredUnit
from reproduce.planted.units import ADAPTER

#: Units read for each difference, and the first units of which false descriptions are counted.
BUDGETS, INSPECTED = (1, 2, 5, MOST), 20
#: Least mean probability of a planted difference's words in the target, and largest in the base.
LEARNED, UNKNOWN = 0.8, 0.1
#: Largest probability in the hybrid of words whose difference is in the MLPs.
LEFT = 0.5


@dataclass(frozen=True)
class Seed:
    """A seed of the benchmark.

    Attributes:
        number: the seed.
        judge: knows its differences.
        planted, null: what was measured of its organisms; not every seed has a null.
    """

    number: int
    judge: Judge
    planted: Measured
    null: Measured | None = None

    @cached_property
    def described(self) -> dict[str, list[list[int]]]:
        """The differences that each unit of the planted organism describes, by method."""
        return _described(self.judge, self.planted["units"])

    def hits(self, method: str, budget: int) -> list[float]:
        """Return whether each difference is described by a method's first units: 1 or 0."""
        k = len(self.planted["differences"])
        first = self.described[method][: budget * k]
        numbers = {number for numbers in first for number in numbers}
        return [float(number in numbers) for number in range(k)]

    def precise(self, method: str) -> list[float]:
        """Return whether each of the first units describes a difference."""
        return _first(self.described[method])

    def mistaken(self, method: str) -> list[float]:
        """Return how often each of the first units describes a difference by another's words."""
        units = {method: self.planted["units"][method][:INSPECTED]}
        judges = self.judge.with_words_of_others()
        each = [_first(_described(judge, units)[method]) for judge in judges]
        mean: list[float] = torch.tensor(each).mean(0).tolist()
        return mean

    @cached_property
    def false(self) -> dict[str, list[float]]:
        """Whether each of the null's first units describes a difference, by method."""
        assert self.null is not None
        described = _described(self.judge, self.null["units"])
        return {method: _first(units) for method, units in described.items()}


def _described(
    judge: Judge, units: Mapping[str, Sequence[StoredUnit]]
) -> dict[str, list[list[int]]]:
    return {
        method: [judge.describes(Unit(**unit)) for unit in each] for method, each in units.items()
    }


def _first(described: Sequence[Sequence[int]]) -> list[float]:
    """Return whether each of the first units describes anything; a missing unit does not."""
    said = [float(bool(numbers)) for numbers in described[:INSPECTED]]
    return said + [0.0] * (INSPECTED - len(said))


def is_planted(row: DifferenceRow) -> bool:
    """Return whether the target says a difference's words at its places, and the base does not."""
    target, base = (row["probability"][name] for name in ("target", "base"))
    return target is not None and base is not None and target >= LEARNED and base <= UNKNOWN


def is_in_mlps(row: DifferenceRow) -> bool:
    """Return whether a planted difference is gone in the hybrid."""
    hybrid = row["probability"]["hybrid"]
    return is_planted(row) and hybrid is not None and hybrid <= LEFT


def summarise(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Return recall and false descriptions of every method, for one seed or more.

    The intervals are those of :mod:`reproduce.planted.intervals`. Without a null, or with no
    difference of a class, the values are None.
    """
    methods = list(seeds[0].planted["units"])
    ours = {budget: _hits(seeds, ADAPTER, budget) for budget in BUDGETS}
    return {
        "differences": [row for seed in seeds for row in _rows(seed)],
        "methods": {
            method: {
                **_recall(seeds, {budget: _hits(seeds, method, budget) for budget in BUDGETS}),
                **_descriptions(seeds, method),
                "adapter_minus": None
                if method == ADAPTER
                else {
                    str(budget): gap(ours[budget], _hits(seeds, method, budget)).plain()
                    for budget in BUDGETS
                },
            }
            for method in methods
        },
    }


def _hits(seeds: Sequence[Seed], method: str, budget: int) -> Tensor:
    return torch.tensor([seed.hits(method, budget) for seed in seeds])


def _recall(seeds: Sequence[Seed], hits: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return recall by budget: of all differences, and of classes of them."""
    rows = [seed.planted["differences"] for seed in seeds]
    classes: dict[str, list[list[bool]]] = {
        "all": [[True] * len(each) for each in rows],
        "planted": [list(map(is_planted, each)) for each in rows],
        "in_mlps": [list(map(is_in_mlps, each)) for each in rows],
        **{kind: [[row["kind"] == kind for row in each] for each in rows] for kind in KINDS},
        **{w: [[row["words"] == w for row in each] for each in rows] for w in ("new", "usual")},
    }
    return {
        "recall": {
            name: {str(b): share(each, torch.tensor(counted)).plain() for b, each in hits.items()}
            for name, counted in classes.items()
        }
    }


def _descriptions(seeds: Sequence[Seed], method: str) -> dict[str, Any]:
    """Return how many of the first INSPECTED units describe a planted difference, or another."""
    nulls = [seed.false[method] for seed in seeds if seed.null is not None]
    values = {
        "right": [seed.precise(method) for seed in seeds],
        "words_of_others": [seed.mistaken(method) for seed in seeds],
        "null": nulls,
    }
    counts = {}
    for name, each in values.items():
        ends = share(torch.tensor(each).view(-1, INSPECTED)).plain()
        counts[name] = {end: None if v is None else INSPECTED * v for end, v in ends.items()}
    return {"described": counts}


def _rows(seed: Seed) -> list[dict[str, Any]]:
    """Return a seed's differences, with the probability of their words in every model."""
    null = seed.null["differences"] if seed.null is not None else None
    return [
        {
            "seed": seed.number,
            "kind": row["kind"],
            "words": row["words"],
            "text": row["text"],
            "places": row["places"],
            "probability": {
                "base": row["probability"]["base"],
                "null": null[k]["probability"]["target"] if null is not None else None,
                "hybrid": row["probability"]["hybrid"],
                "planted": row["probability"]["target"],
            },
            "elsewhere": {"base": row["elsewhere"]["base"], "planted": row["elsewhere"]["target"]},
            "is_planted": is_planted(row),
            "is_in_mlps": is_in_mlps(row),
        }
        for k, row in enumerate(seed.planted["differences"])
    ]
