"""Confidence intervals of shares over the seeds of the benchmark.

The differences of an organism are no sample of differences: each seed has the same eight kinds, one
of each. They are fixed strata, and only seeds are drawn. A seed gives one share, and the interval
is Student's over the shares of S seeds.

Where all seeds have the same share, its spread says nothing. Then the interval is Wilson's over all
seeds and units, which assumes that they are independent; that of a difference of two such shares is
Newcombe's (1998, Statistics in Medicine 17, 873-890), which assumes so of the two as well.

All organisms come from one base. No interval covers the choice of another base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.evaluation.seeds import student_quantile
from fastadapt.evaluation.statistics import Intervals, wilson


def share(values: Tensor, counted: Tensor | None = None) -> Intervals:
    """Return the mean over seeds of each seed's mean, with its interval of 95%.

    Args:
        values: ``[S, U]``, each in [0, 1], of U units or differences of each seed.
        counted: bool ``[S, U]``, those of which the mean is taken; all by default. A seed without
            one is left out.

    Returns:
        Scalars. All are NaN without a seed, and the ends with a single one.

    Example:
        >>> hits = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
        >>> [round(end.item(), 2) for end in share(hits)]
        [0.83, 0.47, 1.0]
        >>> [round(end.item(), 2) for end in share(torch.ones(3, 4))]
        [1.0, 0.76, 1.0]
    """
    shares, n = _shares(values, counted)
    mean = shares.mean()
    if len(shares) > 1 and _equal(shares):
        return wilson(mean * n, n)
    half = _half(shares)
    return Intervals(mean, (mean - half).clamp(min=0), (mean + half).clamp(max=1))


def gap(first: Tensor, second: Tensor) -> Intervals:
    """Return the mean over seeds of a share minus another of the same seed, with its interval.

    Args:
        first, second: as ``values`` of :func:`share`.

    Example:
        >>> [round(end.item(), 2) for end in gap(torch.ones(3, 4), torch.zeros(3, 4))]
        [1.0, 0.66, 1.0]
    """
    gaps = _shares(first)[0] - _shares(second)[0]
    mean = gaps.mean()
    if len(gaps) > 1 and _equal(gaps):
        a, b = share(first), share(second)
        below = ((a.mean - a.low).square() + (b.high - b.mean).square()).sqrt()
        above = ((a.high - a.mean).square() + (b.mean - b.low).square()).sqrt()
    else:
        below = above = _half(gaps)
    return Intervals(mean, (mean - below).clamp(min=-1), (mean + above).clamp(max=1))


def _shares(values: Tensor, counted: Tensor | None = None) -> tuple[Tensor, int]:
    """Return the means of the seeds that have one, and the number of values in them."""
    values = values.double()
    counted = torch.ones_like(values) if counted is None else counted.double()
    n = counted.sum(-1)
    return ((values * counted).sum(-1) / n)[n > 0], int(n.sum())


def _equal(shares: Tensor) -> bool:
    return bool(shares.amax() - shares.amin() < 1e-12)


def _half(shares: Tensor) -> Tensor:
    """Return half the length of Student's interval of a mean; NaN for one value."""
    if len(shares) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    t = student_quantile(torch.tensor(len(shares) - 1.0))
    return t * (shares.var() / len(shares)).sqrt()
