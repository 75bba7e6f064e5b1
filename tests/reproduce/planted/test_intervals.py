"""Intervals over seeds: differences are strata, and equal seeds still have one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadapt.evaluation.seeds import over_seeds
from reproduce.planted.intervals import gap, share

#: Chances that each of eight kinds of differences is found: nothing like a sample of one chance.
CHANCES = torch.tensor([1.0, 0.95, 1.0, 0.1, 1.0, 0.6, 0.9, 0.4])


def ends(interval: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    return [round(end.item(), 3) for end in interval]


def test_the_interval_is_students_over_the_seeds() -> None:
    values = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert ends(share(values)) == [0.5, 0.0, 1.0]  # 4.303 · 0.25 / √3 = 0.62, and no share is less
    eight = torch.cat([values, values, values[:2]])
    half = 2.365 * 0.2086 / 8**0.5  # 7 degrees of freedom, and the deviation of the eight shares
    assert ends(share(eight)) == pytest.approx([0.531, 0.531 - half, 0.531 + half], abs=1e-3)


def test_kinds_that_differ_do_not_widen_it() -> None:
    """Seeds find the same share of kinds of which half are always found and half almost never."""
    values = torch.tensor([[1.0] * 4 + [0.0] * 4] * 7 + [[1.0] * 5 + [0.0] * 3])
    mean, low, high = ends(share(values))
    crossed = over_seeds(values, torch.ones(8), bounds=(0.0, 1.0))
    assert high - low < 0.1 < 0.7 < (crossed.high - crossed.low).item()
    assert low < mean < high


@pytest.mark.parametrize(
    ("seeds", "units", "value", "expected"),
    [
        (8, 8, 1.0, [1.0, 0.943, 1.0]),
        (4, 20, 0.0, [0.0, 0.0, 0.046]),
        (8, 8, 0.875, [0.875, 0.772, 0.935]),
    ],
)
def test_equal_seeds_have_wilsons_over_all_units(
    seeds: int, units: int, value: float, expected: list[float]
) -> None:
    row = [1.0] * round(units * value) + [0.0] * round(units * (1 - value))
    assert ends(share(torch.tensor([row] * seeds))) == expected


def test_one_seed_and_none_have_no_interval() -> None:
    mean, low, high = share(torch.tensor([[1.0, 0.0]]))
    assert mean == 0.5
    assert low.isnan()
    assert high.isnan()
    assert share(torch.zeros(0, 20)).mean.isnan()
    assert gap(torch.ones(1, 2), torch.zeros(1, 2)).plain() == {
        "mean": 1.0,
        "low": None,
        "high": None,
    }


def test_only_what_counts_counts() -> None:
    values = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    counted = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    assert ends(share(values, counted)) == [1.0, 0.439, 1.0]  # three of three, and no third seed
    assert share(values, torch.zeros(3, 3, dtype=torch.bool)).mean.isnan()


def test_gaps_are_of_the_same_seeds() -> None:
    first = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    better = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    mean, low, high = ends(gap(first, better))
    assert (mean, low < 0.375 < high) == (0.375, True)
    assert ends(gap(first, better))[1:] != ends(gap(first, better.roll(1, 0)))[1:]
    assert ends(gap(first, first)) == [0.0, *ends(gap(first, first))[1:]]


def test_equal_gaps_have_an_interval() -> None:
    mean, low, high = ends(gap(torch.ones(8, 8), torch.ones(8, 8)))
    assert (mean, low, high) == (0.0, -0.057, 0.057)  # no more than either one's own
    assert ends(gap(torch.ones(8, 8), torch.zeros(8, 8)))[1] > 0.9


def test_coverage_with_fixed_kinds() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = CHANCES.mean()
    n, covered = 500, 0
    for _ in range(n):
        _, low, high = share((torch.rand(8, 8, generator=generator) < CHANCES).double())
        covered += bool(low <= mean <= high)
    assert 0.92 < covered / n < 0.98
