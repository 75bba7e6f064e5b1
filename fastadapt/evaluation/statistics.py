"""Confidence intervals of quantities that are measured on a sample of sequences or questions.

Every reported quantity is a ratio of sums over *units* (sequences or questions). Top-1 error is the
number of wrong positions of all sequences over the number of positions. Accuracy is the number of
right answers to all questions over the number of answers. Positions of one sequence depend on each
other, and so do answers to one question. Units are independent, so units are resampled: sequences
for faithfulness, questions with all their repetitions for benchmarks. A difference of two models on
the same units, and the share of a gain that a model recovers, are ratios of sums too. This pairs
the models.

The interval is the bootstrap-t (Efron and Tibshirani 1993, chapter 12). Its error in coverage is of
the order 1/n at each end; that of the percentile interval is 1/sqrt(n). Measured coverage of 95%
intervals in 8,000 experiments each (in brackets: the percentile interval): 94.2% (91.7%) on 50
units with exponential rates, 92.1% (88.9%) on 50 units with log-normal rates of σ = 1, and 94.8%
and 94.4% on 500 units.

Near 0 and 1, few units determine the spread of a proportion. The interval of a proportion is
therefore joined with Wilson's interval (1927) on the effective sample size p(1-p)/se² (after Korn
and Graubard 1998). It never exceeds Wilson's interval with one observation per unit, which bounds
the effect of clustering. For units with one observation each, both are the usual Wilson interval.

n units, K quantities, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError

_ENTRIES = 1 << 24  # largest size of the [R, n] matrix of draws per resample and unit
_ROUNDING = 1e-12  # bound of rounding errors, as a share of the root of a sum of squares


@dataclass(frozen=True)
class BootstrapConfig:
    """Settings of the bootstrap confidence intervals.

    Args:
        level: confidence level, in [0.5, 1).
        resamples: number of bootstrap samples, at least 200.
        seed: seed of the resampling. Equal seeds and numbers of units give equal resamples.
    """

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.level < 1:
            raise UserError(f"statistics.level: expected a share in [0.5, 1), got {self.level}")
        if self.resamples < 200:
            raise UserError(f"statistics.resamples: expected 200 or more, got {self.resamples}")


class Intervals(NamedTuple):
    """Estimates and the ends of their intervals: float64 tensors of one shape.

    ``mean`` is NaN without a unit that counts. ``low`` and ``high`` are NaN with fewer than two.
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    def plain(self) -> Any:
        """Return ``{"mean", "low", "high"}`` for JSON, or nested lists of such dicts.

        Values that are not finite become None.

        Example:
            >>> Intervals(*torch.tensor([0.5, 0.25, math.inf])).plain()
            {'mean': 0.5, 'low': 0.25, 'high': None}
        """
        if self.mean.ndim:
            rows = zip(self.mean, self.low, self.high, strict=True)
            return [Intervals(*row).plain() for row in rows]
        values = zip(self._fields, (end.item() for end in self), strict=True)
        return {name: value if math.isfinite(value) else None for name, value in values}


def ratio(
    sums: Tensor,
    counts: Tensor,
    *,
    bounds: tuple[float, float] | None = None,
    strata: Tensor | None = None,
    config: BootstrapConfig | None = None,
) -> Intervals:
    """Return the interval of ``Σ sums / Σ counts`` over the n sampled units (texts or questions).

    Use it for means, proportions and paired differences.

    Args:
        sums: real ``[..., n]``: each unit's sum of the averaged quantity.
        counts: ``[n]`` or the shape of ``sums``: number of terms of each sum. Units of count 0 are
            resampled too, as they were part of the sample.
        bounds: least and largest value of a unit's ratio ``sums / counts``. With two finite bounds
            the ratio is treated as a proportion; with one, the interval is only clamped.
        strata: int ``[n]``: number of each unit's stratum, such as its benchmark. Strata are fixed;
            only units within them are sampled. Default: all units are of one.
        config: settings of the intervals.

    Returns:
        Intervals of the leading shape of ``sums``, all from the same resamples.

    Raises:
        RuntimeError: ``counts`` cannot be broadcast to ``sums``.
        ValueError: a value is not finite.
    """
    config = config or BootstrapConfig()
    x = sums.detach().to("cpu", torch.float64)
    c = counts.detach().to("cpu", torch.float64).expand_as(x)
    if not (x.isfinite().all() and c.isfinite().all()):
        raise ValueError("sums, counts: expected finite values, got NaN or infinity")
    if strata is not None:
        x = x - between(x - x.sum(-1, keepdim=True) / c.sum(-1, keepdim=True) * c, strata)
    shape, (x, c) = x.shape[:-1], (x.reshape(-1, x.shape[-1]), c.reshape(-1, x.shape[-1]))
    units = (c != 0).sum(1)
    moments = torch.stack([x, c, x * x, x * c, c * c])
    sums = moments.sum(-1)
    # Centring leaves rounding errors in entries that are 0 without it. A resample of such entries
    # alone has no others to compare them with, so they are compared with those of the sample.
    noise = _ROUNDING**2 * (sums[2] + (sums[0] / sums[1]) ** 2 * sums[4])
    mean, error = _studentised(sums, units, noise)
    t = torch.cat(
        [
            _t_statistic(drawn, _studentised(drawn, units, noise), mean, noise)
            for drawn in _resampled(moments, config.resamples, config.seed)
        ]
    )
    tail = (1 - config.level) / 2
    ends = _quantiles(t, torch.tensor([1 - tail, tail], dtype=torch.float64))
    low, high = mean - ends[0] * error, mean - ends[1] * error
    exact = error == 0  # all units have the same ratio
    low, high = torch.where(exact, mean, low), torch.where(exact, mean, high)
    if bounds is not None:
        low, high = _bounded(low, high, mean, error, c, bounds, config.level)
    few = units < 2
    low, high = low.masked_fill(few, math.nan), high.masked_fill(few, math.nan)
    return Intervals(mean.reshape(shape), low.reshape(shape), high.reshape(shape))


def between(values: Tensor, strata: Tensor) -> Tensor:
    """Return the mean of each unit's stratum, ``[..., n]`` as ``values``.

    Example:
        >>> between(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist()
        [2.0, 2.0, 5.0]
    """
    members = torch.nn.functional.one_hot(strata).to(values.dtype)
    return values @ members / members.sum(0) @ members.T


def wilson(successes: Tensor | float, trials: Tensor | float, level: float = 0.95) -> Intervals:
    """Return Wilson's interval (1927) of a proportion of independent trials.

    Args:
        successes, trials: numbers, of one shape, with 0 <= successes <= trials; integers or not.
        level: confidence level.

    Example:
        >>> interval = wilson(8, 10)
        >>> [round(end.item(), 3) for end in interval]
        [0.8, 0.49, 0.943]
    """
    n = torch.as_tensor(trials, dtype=torch.float64)
    p = torch.as_tensor(successes, dtype=torch.float64) / n
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)).clamp(min=0).sqrt() / (1 + z * z / n)
    # The formula gives exactly 0 at p = 0 and 1 at p = 1, but for rounding.
    low = torch.where(p == 0, 0.0, middle - half)
    return Intervals(p, low, torch.where(p == 1, 1.0, middle + half))


def most_of_none(exposure: float, level: float = 0.95) -> float:
    """Return the upper end of the interval of a rate (events per exposure) after no event.

    A sample without events has no spread to resample. The value is that of the exact interval of a
    Poisson count (Garwood 1936), ``-ln((1 - level) / 2) / exposure``; NaN for an exposure of 0.
    """
    return -math.log((1 - level) / 2) / exposure if exposure > 0 else math.nan


def recovered(
    scores: Tensor,
    floor: Tensor,
    ceiling: Tensor,
    config: BootstrapConfig | None = None,
    *,
    strata: Tensor | None = None,
) -> Intervals:
    """Return the share of a gain that a model recovers, ``(scores - floor) / (ceiling - floor)``.

    The share is a ratio of means over questions. A resample takes the same questions of all three.

    Args:
        scores: ``[..., n]``: scores of one or more models on each question, each a mean over
            repetitions.
        floor, ceiling: ``[n]``: scores of the hybrid (or base) and of the target.
        config: settings of the intervals.
        strata: of the questions, as in :func:`ratio`.

    Returns:
        Intervals of the leading shape of ``scores``. They are NaN if the interval of the gain
        reaches 0, and their ends are NaN where a model scores as the floor or as the ceiling on
        every question, since such scores have no spread to resample.
    """
    gains = ceiling - floor
    largest = gains.abs().max().item()
    ends = (-largest, largest)
    gain = ratio(gains, torch.ones_like(floor), bounds=ends, strata=strata, config=config)
    if not gain.low > 0:
        undefined = torch.full(scores.shape[:-1], math.nan, dtype=torch.float64)
        return Intervals(undefined, undefined, undefined)
    share = ratio(scores - floor, gains, strata=strata, config=config)
    exact = share.low == share.high
    return Intervals(share.mean, *(end.masked_fill(exact, math.nan) for end in share[1:]))


def difference(a: Intervals, b: Intervals) -> Intervals:
    """Return the interval of ``a - b`` for estimates from two independent samples.

    The method is MOVER (Zou and Donner 2008): each end lies as far from the estimate as the
    distances of the two nearer ends, added as squares.

    Example:
        >>> ends = (Intervals(*map(torch.tensor, x)) for x in ((0.5, 0.2, 0.9), (0.1, 0.0, 0.4)))
        >>> [round(end.item(), 3) for end in difference(*ends)]
        [0.4, -0.024, 0.812]
    """
    low = ((a.mean - a.low) ** 2 + (b.high - b.mean) ** 2).sqrt()
    high = ((a.high - a.mean) ** 2 + (b.mean - b.low) ** 2).sqrt()
    mean = a.mean - b.mean
    return Intervals(mean, mean - low, mean + high)


def paired_difference(
    a: Tensor, b: Tensor, counts: Tensor, config: BootstrapConfig | None = None
) -> Intervals:
    """Return the interval of the difference of two proportions that are paired by unit.

    It is that of :func:`ratio` of ``a - b``. If hardly a unit differs, that one is without a bound
    or without a width; :func:`difference` of the two proportions, for independent samples, then
    takes its place. It also bounds the ends where the proportions do not vary against each other,
    for which it is too wide.

    Args:
        a, b: ``[..., n]``: each unit's sums of values in 0..1.
        counts: ``[n]``: number of terms of each sum.
        config: settings of the intervals.
    """
    paired = ratio(a - b, counts, config=config)
    apart = difference(*(ratio(each, counts, bounds=(0.0, 1.0), config=config) for each in (a, b)))
    with_a, with_b = (each - each.sum(-1, keepdim=True) / counts.sum() * counts for each in (a, b))
    against = (with_a * with_b).sum(-1) < 0
    exact = paired.low == paired.high
    low = torch.where(against & paired.low.isfinite(), paired.low, paired.low.fmax(apart.low))
    high = torch.where(against & paired.high.isfinite(), paired.high, paired.high.fmin(apart.high))
    return Intervals(
        paired.mean, torch.where(exact, apart.low, low), torch.where(exact, apart.high, high)
    )


def quotient(a: Intervals, b: Intervals) -> Intervals:
    """Return the interval of ``a / b`` by MOVER-R (Donner and Zou 2012, eq. 9).

    The method assumes independent ``a`` and ``b``. For quantities of the same units that vary
    together, the interval is wider than necessary. The upper end is infinite where the interval of
    ``b`` reaches 0; all values are NaN where ``b`` is not above 0.
    """
    product = a.mean * b.mean

    def root(end_a: Tensor, end_b: Tensor) -> Tensor:
        inner = end_a * end_b * (2 * a.mean - end_a) * (2 * b.mean - end_b)
        return (product**2 - inner).clamp(min=0).sqrt()

    # The published lower end, expanded by the conjugate of its numerator: this denominator is
    # never 0.
    low = a.low * (2 * a.mean - a.low) / (product + root(a.low, b.high))
    high = (product + root(a.high, b.low)) / (b.low * (2 * b.mean - b.low))
    low = torch.where(a.mean > 0, low.clamp(min=0), 0.0)
    high = torch.where(b.low > 0, high, math.inf)
    return Intervals(*(torch.where(b.mean > 0, e, math.nan) for e in (a.mean / b.mean, low, high)))


def _resampled(moments: Tensor, resamples: int, seed: int) -> list[Tensor]:
    """Return sums over the units of each resample: ``[5, R, K]`` in chunks, from ``[5, K, n]``."""
    generator = torch.Generator().manual_seed(seed)
    n = moments.shape[-1]
    chunk = max(1, _ENTRIES // max(n, 1))
    drawn = []
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        units = torch.randint(n, (rows, n), generator=generator)
        draws = torch.zeros(rows, n, dtype=torch.float64)
        draws.scatter_add_(1, units, torch.ones(1, dtype=torch.float64).expand(rows, n))
        drawn.append(draws @ moments.transpose(1, 2))
    return drawn


def _studentised(moments: Tensor, units: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return a ratio of sums and its linearised standard error, from sums of x, c, x², xc, c².

    ``se² = m/(m-1) Σ (x - r c)² / (Σ c)²`` for m units of non-zero count (Cochran 1977, 6.4); 0 if
    the sum of squares is at most ``noise``.
    """
    x, c, xx, xc, cc = moments
    r = x / c
    squares = xx - 2 * r * xc + r * r * cc
    # Where all units have the same ratio the terms cancel, and only rounding errors remain.
    squares = torch.where(squares > noise + 1e-12 * (xx + r * r * cc), squares, 0)
    return r, (squares * units / (units - 1)).sqrt() / c.abs()


def _t_statistic(
    moments: Tensor, resampled: tuple[Tensor, Tensor], mean: Tensor, noise: Tensor
) -> Tensor:
    x, c = moments[:2]
    r, error = resampled
    # A resample without spread that equals the estimate gives 0/0: its t is 0. One without a count
    # stays NaN and is left out of the quantiles.
    is_equal = (error == 0) & ((x - mean * c).abs() <= noise.sqrt())
    return torch.where(is_equal, 0.0, (r - mean) / error)


def _quantiles(t: Tensor, probabilities: Tensor) -> Tensor:
    """Return quantiles of t, ``[2, K]``, without interpolation, since t may be infinite."""
    largest = torch.finfo(t.dtype).max  # torch interpolates first, and inf - inf is NaN
    finite = t.clamp(-largest, largest)
    ends = torch.nanquantile(finite, probabilities, dim=0, interpolation="nearest")
    return torch.where(ends.abs() == largest, ends * math.inf, ends)


def _bounded(
    low: Tensor,
    high: Tensor,
    mean: Tensor,
    error: Tensor,
    counts: Tensor,
    bounds: tuple[float, float],
    level: float,
) -> tuple[Tensor, Tensor]:
    """Clamp intervals to ``bounds``, and join those of proportions with Wilson's."""
    least, largest = bounds
    if math.isfinite(least) and math.isfinite(largest):
        width = largest - least
        p = ((mean - least) / width).clamp(0, 1)
        # Kish's effective number of units, for units that weigh as their counts.
        n_units = counts.abs().sum(1) ** 2 / (counts**2).sum(1)
        spread = (error / width) ** 2
        effective = torch.where(spread > 0, p * (1 - p) / spread, math.inf).maximum(n_units)
        effective = torch.where((p == 0) | (p == 1), n_units, effective)
        exact = effective.isinf()
        near = wilson(p * effective.masked_fill(exact, 1), effective.masked_fill(exact, 1), level)
        far = wilson(p * n_units, n_units, level)
        joined = low.minimum(least + width * near.low), high.maximum(least + width * near.high)
        low = torch.where(exact, low, joined[0].maximum(least + width * far.low))
        high = torch.where(exact, high, joined[1].minimum(least + width * far.high))
    return low.clamp(min=least), high.clamp(max=largest)
