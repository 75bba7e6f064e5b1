"""Coverage of the intervals over seeds and texts, on synthetic runs with a known mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastadapt.evaluation.seeds import difference_over_seeds, over_seeds, student_quantile
from fastadapt.evaluation.statistics import Intervals, wilson

TEXTS = 100
#: Standard deviations of seeds, texts, and of a text in a run, and the distribution of texts.
POPULATIONS = {
    "texts alone": (0.0, 1.0, 0.0, "normal"),
    "no seeds": (0.0, 1.0, 1.0, "normal"),
    "noise alone": (0.0, 0.0, 1.0, "normal"),
    "few seeds": (0.1, 1.0, 1.0, "normal"),
    "both alike": (0.2, 1.0, 1.0, "normal"),
    "more seeds": (0.3, 1.0, 0.3, "normal"),
    "most seeds": (1.0, 1.0, 1.0, "normal"),
    "few seeds, skewed": (0.1, 1.0, 1.0, "log-normal"),
    "more seeds, skewed": (0.3, 1.0, 1.0, "log-normal"),
}
QUICK = ("no seeds", "both alike", "most seeds", "more seeds, skewed")


def draw(
    name: str, seeds: int, experiments: int, generator: torch.Generator, shared: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return values ``[experiments, seeds, TEXTS]`` of mean 0, and the part that texts share."""
    of_seeds, of_texts, of_noise, kind = POPULATIONS[name]

    def normal(*shape: int) -> Tensor:
        return torch.randn(experiments, *shape, generator=generator, dtype=torch.float64)

    texts = normal(1, TEXTS)
    if kind == "log-normal":
        texts = (texts.exp() - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
    texts = texts if shared is None else shared + 0.5 * texts
    values = of_seeds * normal(seeds, 1) + of_texts * texts + of_noise * normal(seeds, TEXTS)
    return values, texts


def coverage(intervals: Intervals) -> float:
    return ((intervals.low <= 0) & (intervals.high >= 0)).double().mean().item()


def measured(name: str, seeds: int, experiments: int) -> tuple[float, float]:
    """Return the coverage of the mean of a group, and of the difference of two groups."""
    generator = torch.Generator().manual_seed(len(name) + seeds)
    ones, of_group, of_difference = torch.ones(TEXTS), [], []
    for _ in range(0, experiments, 1000):
        a, texts = draw(name, seeds, 1000, generator, None)
        b, _ = draw(name, seeds, 1000, generator, texts)
        of_group.append(coverage(over_seeds(a, ones)))
        of_difference.append(coverage(difference_over_seeds(a, b, (ones, ones))))
    return sum(of_group) / len(of_group), sum(of_difference) / len(of_difference)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", QUICK)
def test_coverage_is_93_to_97_percent(name: str, seeds: int) -> None:
    experiments = 1000
    noise = 3 * math.sqrt(0.95 * 0.05 / experiments)
    for value in measured(name, seeds, experiments):
        assert 0.93 - noise <= value <= 0.97 + noise


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("name", POPULATIONS)
def test_coverage_in_20_000_experiments(name: str, seeds: int) -> None:
    group, difference = measured(name, seeds, 20_000)
    print(f"{name}, {seeds} seeds: {group:.2%} of a group, {difference:.2%} of a difference")
    assert 0.93 <= group <= 0.97
    assert 0.93 <= difference <= 0.97


def percentile(values: Tensor, generator: torch.Generator, resamples: int = 400) -> Intervals:
    """Resample seeds, then texts, and take percentiles: the usual two-level bootstrap."""
    n_seeds, n_texts = values.shape[1:]
    means = []
    for _ in range(resamples):
        seeds = torch.randint(n_seeds, (n_seeds,), generator=generator)
        texts = torch.randint(n_texts, (n_texts,), generator=generator)
        means.append(values[:, seeds][:, :, texts].mean((1, 2)))
    ends = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    return Intervals(values.mean((1, 2)), ends[0], ends[1])


def test_simpler_intervals_fail() -> None:
    """The percentile bootstrap, and intervals over texts or over seeds alone, do not cover."""
    generator = torch.Generator().manual_seed(0)
    values, _ = draw("most seeds", 3, 500, generator, None)
    assert coverage(percentile(values, generator)) < 0.85
    of_texts = values.mean(1)
    half = 1.984 * (of_texts.var(-1) / TEXTS).sqrt()
    mean = of_texts.mean(-1)
    assert coverage(Intervals(mean, mean - half, mean + half)) < 0.5
    values, _ = draw("no seeds", 3, 500, generator, None)
    mean, half = values.mean((1, 2)), 4.303 * (values.mean(2).var(1) / 3).sqrt()
    assert coverage(Intervals(mean, mean - half, mean + half)) < 0.9
    assert coverage(over_seeds(values, torch.ones(TEXTS))) > 0.92


def test_two_seeds_are_too_few_for_a_mean() -> None:
    """As the module says."""
    group, difference = measured("more seeds", 2, 2000)
    assert 0.87 < group < 0.93 < difference


def test_equal_runs_have_the_interval_of_one() -> None:
    """Where seeds change nothing, only texts remain: Student's interval of the ratio."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (TEXTS,), generator=generator).double()
    x = torch.rand(TEXTS, generator=generator, dtype=torch.float64) * counts
    interval = over_seeds(torch.stack([x, x, x]), counts)
    ratio = x.sum() / counts.sum()
    spread = ((x - ratio * counts).var() / TEXTS).sqrt() / counts.mean()
    quantile = student_quantile(torch.tensor(TEXTS - 1.0))
    torch.testing.assert_close(interval.mean, ratio)
    torch.testing.assert_close(interval.low, ratio - quantile * spread)
    torch.testing.assert_close(interval.high, ratio + quantile * spread)


def test_a_difference_pairs_texts_and_changes_sign() -> None:
    generator = torch.Generator().manual_seed(1)
    texts = 10 * torch.randn(TEXTS, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 3, TEXTS, generator=generator, dtype=torch.float64)
    a, b, ones = texts + noise[0] + 1, texts + noise[1], torch.ones(TEXTS)
    forward, backward = (difference_over_seeds(x, y, (ones, ones)) for x, y in ((a, b), (b, a)))
    for end, other in zip(forward, (backward.mean, backward.high, backward.low), strict=True):
        torch.testing.assert_close(end, -other)
    widths = [i.high - i.low for i in (forward, over_seeds(a, ones))]
    assert widths[0] < widths[1] / 5  # the texts' own spread cancels
    assert 0 < forward.low < 1 < forward.high


def test_leading_shapes_bounds_levels_and_too_few() -> None:
    values = torch.tensor([[[0.0, 0.1, 0.0], [0.2, 0.3, 0.0]], [[0.5, 0.7, 0.6], [0.6, 0.4, 0.9]]])
    together = over_seeds(values, torch.ones(3), bounds=(0.0, 1.0))
    for i in range(2):
        alone = over_seeds(values[i], torch.ones(3), bounds=(0.0, 1.0))
        for end, other in zip(together, alone, strict=True):
            torch.testing.assert_close(end[i], other)
    assert together.low[0] == 0
    narrow, wide = (over_seeds(values, torch.ones(3), level=level) for level in (0.5, 0.95))
    assert bool((narrow.high - narrow.low < (wide.high - wide.low) / 2).all())
    equal = over_seeds(torch.full((2, 4), 0.5), torch.ones(4))
    none = over_seeds(torch.zeros(3, 20), torch.ones(20), bounds=(0.0, 1.0))
    assert none == wilson(0.0, 20.0)
    assert equal == Intervals(*[torch.tensor(0.5, dtype=torch.float64)] * 3)
    assert over_seeds(torch.rand(2, 1), torch.ones(1)).low.isnan()
    with pytest.raises(ValueError, match=r"expected two or more runs.*got \[1, 3\]"):
        over_seeds(values[0][:1], torch.ones(3))


@pytest.mark.parametrize(
    ("freedom", "level", "expected"),  # tables of Student's t
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (2, 0.9, 2.91999),
        (4, 0.99, 4.60409),
        (30, 0.95, 2.04227),
        (1000, 0.95, 1.96234),
    ],
)
def test_students_quantiles(freedom: float, level: float, expected: float) -> None:
    quantile = student_quantile(torch.tensor([freedom, freedom + 0.5]), level)
    assert quantile[0].item() == pytest.approx(expected, rel=1e-4)
    assert quantile[1] < quantile[0]


def test_groups_without_any_spread_have_a_difference_without_ends() -> None:
    zeros = torch.zeros(2, 30, dtype=torch.float64)
    counts = torch.ones(30, dtype=torch.float64)
    gap = difference_over_seeds(zeros, zeros, (counts, counts))
    assert gap.plain() == {"mean": 0, "low": None, "high": None}
