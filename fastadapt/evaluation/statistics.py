"""Intervals for what is measured on a sample of sequences or questions.

What is reported is a ratio of sums over *units*: top-1 error is the wrong positions of all
sequences over all their positions, accuracy the right answers to all questions over all answers.
The positions of a sequence and the answers to a question depend on each other, units do not, so
units are what is resampled: sequences for faithfulness, questions (with all their repetitions) for
benchmarks. A difference of two students on the same units, and the share of a gain that one of them
recovers, are ratios of sums too, and paired by that.

The interval is the bootstrap-t (Efron and Tibshirani 1993, chapter 12), whose error in coverage is
of the order 1/n at each end; that of the percentile interval is 1/sqrt(n). At 95% on 50 units whose
rates are exponential it covers 94.2% (the percentile interval: 91.7%), log-normal of σ = 1 92.1%
(88.9%), and on 500 units 94.8% and 94.4%, in 8,000 experiments each. A proportion is bounded as
well, and near 0 or 1 few units hold what varies; there the interval is joined with Wilson's (1927)
on the effective sample size p(1-p)/se² (after Korn and Graubard 1998), and never goes beyond
Wilson's with one observation per unit, which no clustering can exceed. Of units with one
observation each, both are Wilson's interval, as it is in the books.

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

_ENTRIES = 1 << 24  # of the matrix that says how often each resample took each unit, at a time


@dataclass(frozen=True)
class BootstrapConfig:
    """How intervals are made.

    Args:
        level: share of repetitions of the measurement in which the interval holds the truth.
        resamples: bootstrap samples, at least 200.
        seed: of the resampling; equal seeds and numbers of units give equal resamples.
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
    """Estimates and the ends of their intervals: float64, of one shape.

    NaN where there is none: no unit counts, or, at the ends, too few of them to tell.
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    def plain(self) -> Any:
        """``{"mean", "low", "high"}`` of a 0-d interval, nested lists of them otherwise.

        For JSON: what is not finite is None.
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
    config: BootstrapConfig | None = None,
) -> Intervals:
    """Interval of ``Σ sums / Σ counts`` over units: means, proportions, paired differences.

    Args:
        sums: ``[..., n]``, real: of each unit the sum of what is averaged.
        counts: ``[n]`` or of the shape of ``sums``: how many terms each sum has. Units of count 0
            have nothing to say; they are still drawn, as they were when the sample was.
        bounds: what a unit's own ratio ``sums / counts`` cannot leave: ``(0, 1)`` makes it a
            proportion; an end that is infinite does no more than cut at the other one.

    Returns:
        Intervals of the leading shape of ``sums``; all share the same resamples.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    config = config or BootstrapConfig()
    x = sums.detach().to("cpu", torch.float64)
    c = counts.detach().to("cpu", torch.float64).expand_as(x)
    if not (x.isfinite().all() and c.isfinite().all()):
        raise ValueError("sums and counts: expected finite numbers")
    shape, (x, c) = x.shape[:-1], (x.reshape(-1, x.shape[-1]), c.reshape(-1, x.shape[-1]))
    units = (c != 0).sum(1)
    moments = torch.stack([x, c, x * x, x * c, c * c])
    mean, error = _studentised(moments.sum(-1), units)
    t = torch.cat(
        [
            _t(_studentised(drawn, units), mean)
            for drawn in _resampled(moments, config.resamples, config.seed)
        ]
    )
    tail = (1 - config.level) / 2
    ends = _quantiles(t, torch.tensor([1 - tail, tail], dtype=torch.float64))
    low, high = mean - ends[0] * error, mean - ends[1] * error
    exact = error == 0  # all units agree: nothing to resample
    low, high = torch.where(exact, mean, low), torch.where(exact, mean, high)
    if bounds is not None:
        low, high = _bounded(low, high, mean, error, c, bounds, config.level)
    few = units < 2
    low, high = low.masked_fill(few, math.nan), high.masked_fill(few, math.nan)
    return Intervals(mean.reshape(shape), low.reshape(shape), high.reshape(shape))


def wilson(successes: Tensor | float, trials: Tensor | float, level: float = 0.95) -> Intervals:
    """Wilson's interval (1927) of a plain proportion of independent trials.

    Args:
        successes, trials: of one shape, 0 <= successes <= trials; they need not be integers.
    """
    n = torch.as_tensor(trials, dtype=torch.float64)
    p = torch.as_tensor(successes, dtype=torch.float64) / n
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)).clamp(min=0).sqrt() / (1 + z * z / n)
    # At 0 and 1 the ends are these, which rounding must not move.
    low = torch.where(p == 0, 0.0, middle - half)
    return Intervals(p, low, torch.where(p == 1, 1.0, middle + half))


def most_of_none(exposure: float, level: float = 0.95) -> float:
    """Upper end of the interval of a rate, events per exposure, of which no event was seen.

    The exact one of a Poisson count (Garwood 1936), ``-ln((1 - level) / 2) / exposure``: a sample
    in which nothing happened has no spread, and says little where it is small.
    """
    return -math.log((1 - level) / 2) / exposure if exposure > 0 else math.nan


def recovered(
    student: Tensor, floor: Tensor, ceiling: Tensor, config: BootstrapConfig | None = None
) -> Intervals:
    """Share of a gain that a student recovers, ``(student - floor) / (ceiling - floor)``.

    Of the means over questions, paired: a resample takes the same questions of all three.

    Args:
        student, floor, ceiling: ``[n]``, the score of each on each question (its mean over
            repetitions): of the student, the hybrid, the target.

    Returns:
        A 0-d interval; NaN throughout where the gain itself is not above 0 at the stated level.
    """
    gains = ceiling - floor
    most = gains.abs().max().item()
    gain = ratio(gains, torch.ones_like(floor), bounds=(-most, most), config=config)
    if not gain.low > 0:
        nothing = torch.tensor(math.nan, dtype=torch.float64)
        return Intervals(nothing, nothing, nothing)
    return ratio(student - floor, gains, config=config)


def quotient(a: Intervals, b: Intervals) -> Intervals:
    """Interval of ``a / b`` from those of the two: MOVER-R (Donner and Zou 2012, eq. 9).

    It takes the two as independent, so where they are measured on the same units and vary together,
    it is wider than it need be. Infinite where ``b`` reaches 0, NaN where ``b`` is 0.
    """
    product = a.mean * b.mean

    def root(of_a: Tensor, of_b: Tensor) -> Tensor:
        inner = of_a * of_b * (2 * a.mean - of_a) * (2 * b.mean - of_b)
        return (product**2 - inner).clamp(min=0).sqrt()

    # The published form of the lower end times the conjugate of its numerator, which is never 0.
    low = a.low * (2 * a.mean - a.low) / (product + root(a.low, b.high))
    high = (product + root(a.high, b.low)) / (b.low * (2 * b.mean - b.low))
    low = torch.where(a.mean > 0, low.clamp(min=0), 0.0)
    high = torch.where(b.low > 0, high, math.inf)
    return Intervals(*(torch.where(b.mean > 0, e, math.nan) for e in (a.mean / b.mean, low, high)))


def _resampled(moments: Tensor, resamples: int, seed: int) -> list[Tensor]:
    """Sums over the units of each resample: of ``[5, K, n]``, some ``[5, R, K]``."""
    generator = torch.Generator().manual_seed(seed)
    n = moments.shape[-1]
    at_once = max(1, _ENTRIES // max(n, 1))
    drawn = []
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        taken = torch.randint(n, (rows, n), generator=generator)
        times = torch.zeros(rows, n, dtype=torch.float64)
        times.scatter_add_(1, taken, torch.ones(1, dtype=torch.float64).expand(rows, n))
        drawn.append(times @ moments.transpose(1, 2))
    return drawn


def _studentised(moments: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """A ratio of sums and its standard error, linearised, from sums of x, c, x², xc, c².

    ``se² = m/(m-1) Σ (x - r c)² / (Σ c)²``, of m units that count (Cochran 1977, 6.4).
    """
    x, c, xx, xc, cc = moments
    r = x / c
    squares = xx - 2 * r * xc + r * r * cc
    # What is left of the cancellation is rounding where all units agree.
    squares = torch.where(squares > 1e-12 * (xx + r * r * cc), squares, 0)
    return r, (squares * units / (units - 1)).sqrt() / c.abs()


def _t(resampled: tuple[Tensor, Tensor], mean: Tensor) -> Tensor:
    r, error = resampled
    t = (r - mean) / error
    # A resample without spread that hits the estimate says 0; one without a count says nothing.
    return torch.where(t.isnan() & r.isfinite() & (r == mean), 0.0, t)


def _quantiles(t: Tensor, at: Tensor) -> Tensor:
    """``[2, K]``; the nearest resample, since those without spread are infinite."""
    largest = torch.finfo(t.dtype).max  # the library interpolates first, and inf - inf is NaN
    finite = t.clamp(-largest, largest)
    ends = torch.nanquantile(finite, at, dim=0, interpolation="nearest")
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
    least, most = bounds
    if math.isfinite(least) and math.isfinite(most):
        width = most - least
        p = ((mean - least) / width).clamp(0, 1)
        whole = counts.abs().sum(1) ** 2 / (counts**2).sum(1)  # units, weighed by their counts
        spread = (error / width) ** 2
        effective = torch.where(spread > 0, p * (1 - p) / spread, math.inf).maximum(whole)
        effective = torch.where((p == 0) | (p == 1), whole, effective)
        agreed = effective.isinf()
        near = wilson(p * effective.masked_fill(agreed, 1), effective.masked_fill(agreed, 1), level)
        far = wilson(p * whole, whole, level)
        joined = low.minimum(least + width * near.low), high.maximum(least + width * near.high)
        low = torch.where(agreed, low, joined[0].maximum(least + width * far.low))
        high = torch.where(agreed, high, joined[1].minimum(least + width * far.high))
    return low.clamp(min=least), high.clamp(max=most)
