"""Coverage of the intervals, on populations with a known ratio."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.evaluation.statistics import (
    BootstrapConfig,
    Intervals,
    most_of_none,
    paired_difference,
    ratio,
    recovered,
    wilson,
)

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"
EXPERIMENTS = 4000 if PROOF else 1000
FAST = BootstrapConfig(resamples=999)
#: Largest difference of coverage and level that the module's docstring allows for 50 to 500 units.
WITHIN = 0.02


def draw(kind: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Return sums and counts ``[EXPERIMENTS, n]`` of a population, and its true ratio.

    Counts are log-normal lengths of sequences. Rates differ by sequence and are independent of the
    lengths, so the true ratio is the mean rate.
    """
    shape = (EXPERIMENTS, n)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        name, _, setting = kind.partition(" ")
        spread = 0.7 if name == "errors" else 0.5
        counts = (100 * torch.exp(spread * torch.randn(shape))).round().clamp(min=5)
        if name == "errors":  # wrong positions, clustered in sequences
            p, size = map(float, setting.split("/"))
            rate = torch.distributions.Beta(p * size, (1 - p) * size).sample(shape)
            return torch.binomial(counts, rate), counts, p
        if name == "exponential":
            return counts * torch.empty(shape).exponential_(), counts, 1.0
        sigma = float(setting)
        return counts * torch.exp(sigma * torch.randn(shape) - sigma**2 / 2), counts, 1.0


def coverage(intervals: Intervals, truth: float) -> float:
    inside = (intervals.low <= truth) & (truth <= intervals.high)
    return inside.double().mean().item()


def noise(level: float) -> float:
    """Return three standard errors of a coverage measured in ``EXPERIMENTS`` experiments."""
    return 3 * math.sqrt(level * (1 - level) / EXPERIMENTS)


@pytest.mark.parametrize("n", [50, 150, 500] if PROOF else [50, 150])
@pytest.mark.parametrize(
    "kind", ["log-normal 0.5", "exponential", "errors 0.5/3", "errors 0.1/10", "errors 0.02/20"]
)
def test_coverage_is_as_stated(kind: str, n: int) -> None:
    sums, counts, truth = draw(kind, n)
    bounds = (0, 1) if kind.startswith("errors") else (0, math.inf)
    covered = coverage(ratio(sums, counts, bounds=bounds, config=FAST), truth)
    assert abs(covered - FAST.level) < WITHIN + noise(FAST.level)


@pytest.mark.parametrize("p", [0.002, 0.998])
def test_coverage_near_the_bounds_is_at_least_the_level(p: float) -> None:
    sums, counts, _ = draw("errors 0.002/50", 50)
    if p > 0.5:
        sums = counts - sums
    intervals = ratio(sums, counts, bounds=(0, 1), config=FAST)
    assert coverage(intervals, p) > FAST.level - noise(FAST.level)
    assert intervals.low.min() >= 0
    assert intervals.high.max() <= 1


def test_other_levels() -> None:
    level = 0.8
    sums, counts, truth = draw("exponential", 100)
    intervals = ratio(sums, counts, config=BootstrapConfig(level=level, resamples=999))
    assert abs(coverage(intervals, truth) - level) < WITHIN + noise(level)


def test_simpler_methods_fail_the_same_test() -> None:
    """The populations distinguish methods: the percentile interval does not cover enough."""
    sums, counts, truth = draw("exponential", 50)
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(50, (FAST.resamples, 50), generator=generator)
    draws = torch.zeros(FAST.resamples, 50).scatter_add_(
        1, units, torch.ones(1).expand(*units.shape)
    )
    means = (sums @ draws.T) / (counts @ draws.T)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975]), dim=1)
    assert FAST.level - coverage(Intervals(means[:, 0], low, high), truth) > WITHIN
    # Neither does Wilson's interval that takes positions as independent.
    errors, counts, truth = draw("errors 0.1/10", 50)
    plain = wilson(errors.sum(1), counts.sum(1))
    assert FAST.level - coverage(plain, truth) > 0.2


@pytest.mark.parametrize(("questions", "repetitions"), [(30, 10), (40, 10), (198, 3), (500, 1)])
def test_accuracy_over_questions_and_repetitions(questions: int, repetitions: int) -> None:
    """Sizes of the published benchmarks, with questions of very different difficulty."""
    shape = (EXPERIMENTS, questions)
    rate = torch.distributions.Beta(0.6, 0.4).sample(shape)
    answers = torch.full(shape, float(repetitions))
    right = torch.binomial(answers, rate)
    covered = coverage(ratio(right, answers, bounds=(0, 1), config=FAST), 0.6)
    assert abs(covered - FAST.level) < WITHIN + noise(FAST.level)
    if repetitions > 1:  # Wilson's interval takes repetitions as independent
        plain = coverage(wilson(right.sum(1), answers.sum(1)), 0.6)
        assert FAST.level - plain > WITHIN + noise(FAST.level)


def test_paired_differences_cover_and_are_narrower_than_unpaired() -> None:
    sums, counts, _ = draw("log-normal 0.5", 60)
    extra, *_ = draw("log-normal 0.5", 60, seed=1)
    other = sums + 0.1 * extra  # another model, wrong at the same positions
    difference = ratio(other - sums, counts, config=FAST)
    wanted = 0.1 * (extra.sum() / counts.sum()).item()
    assert abs(coverage(difference, wanted) - FAST.level) < WITHIN + noise(FAST.level)
    alone = ratio(sums, counts, config=FAST)
    assert (difference.high - difference.low).mean() < 0.3 * (alone.high - alone.low).mean()


def test_share_of_a_gain() -> None:
    """Questions differ in difficulty; the three models answer each several times."""
    n, repetitions, wanted = 60, 10, 0.75
    shape = (min(EXPERIMENTS, 400), n)
    floor = torch.empty(shape).uniform_(0.1, 0.4)
    gain = torch.empty(shape).uniform_(0.2, 0.5)
    rates = {"floor": floor, "model": floor + wanted * gain, "ceiling": floor + gain}
    seen = {
        name: torch.binomial(torch.full(shape, float(repetitions)), rate) / repetitions
        for name, rate in rates.items()
    }
    covered = 0
    for scores, low, high in zip(seen["model"], seen["floor"], seen["ceiling"], strict=True):
        share = recovered(scores, low, high, FAST)
        covered += bool(share.low <= wanted <= share.high)
    error = 3 * math.sqrt(0.95 * 0.05 / len(seen["model"]))
    assert abs(covered / len(seen["model"]) - 0.95) < WITHIN + error


def test_no_gain_has_no_share() -> None:
    flat = torch.tensor([0.0, 1.0] * 10)
    share = recovered(flat, flat, flat.flip(0), FAST)
    assert share.plain() == {"mean": None, "low": None, "high": None}


def test_one_observation_per_unit_is_wilsons_interval() -> None:
    hits = torch.tensor([1.0] * 7 + [0.0] * 43)
    got = ratio(hits, torch.ones(50), bounds=(0, 1))
    want = wilson(7, 50)
    torch.testing.assert_close(got.low, want.low)
    torch.testing.assert_close(got.high, want.high)
    # Newcombe 1998, table I: 81 of 263.
    published = wilson(81, 263)
    assert published.low.item() == pytest.approx(0.2553, abs=5e-5)
    assert published.high.item() == pytest.approx(0.3662, abs=5e-5)


@pytest.mark.parametrize("hit", [0.0, 1.0])
def test_all_wrong_and_all_right(hit: float) -> None:
    counts = torch.full((40,), 100.0)
    got = ratio(hit * counts, counts, bounds=(0, 1))
    want = wilson(40 * hit, 40)
    torch.testing.assert_close(got.low, want.low)
    torch.testing.assert_close(got.high, want.high)
    assert got.mean == hit


def test_rows_are_the_same_alone_and_together_and_seeded() -> None:
    sums, counts, _ = draw("exponential", 30)
    together = ratio(sums[:3], counts[:3], config=FAST)
    for row in range(3):
        alone = ratio(sums[row], counts[row], config=FAST)
        for one, all_rows in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_rows[row], rtol=1e-12, atol=0)
    again = ratio(sums[:3], counts[:3], config=FAST)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    other = ratio(sums[:3], counts[:3], config=BootstrapConfig(resamples=999, seed=1))
    assert not torch.equal(other.low, together.low)


def test_units_without_a_count_and_too_few_units() -> None:
    sums, counts = torch.tensor([1.0, 2.0, 3.0, 2.5]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    padded = ratio(torch.cat([sums, torch.zeros(4)]), torch.cat([counts, torch.zeros(4)]))
    assert padded.mean == pytest.approx(8.5 / 8)
    one = ratio(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0]))
    assert one.plain() == {"mean": 0.75, "low": None, "high": None}
    none = ratio(torch.zeros(2, 3), torch.zeros(3)).plain()
    assert none == [{"mean": None, "low": None, "high": None}] * 2
    two = ratio(torch.tensor([1.0, 2.0]), torch.ones(2)).plain()
    assert two == {"mean": 1.5, "low": None, "high": None}
    json.dumps(none, allow_nan=False)


def test_equal_ratios_have_an_interval_of_width_0() -> None:
    counts = torch.tensor([3.0, 7.0, 11.0, 5.0])
    same = ratio(0.3 * counts, counts, bounds=(0, 1))
    assert same.low == same.mean == same.high == pytest.approx(0.3)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_upper_end_of_a_rate_without_events(level: float) -> None:
    """At the upper end, a sample without events has the probability of one tail."""
    high = most_of_none(50.0, level)
    assert math.exp(-50 * high) == pytest.approx((1 - level) / 2)
    assert math.isnan(most_of_none(0.0))


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"statistics\.level: expected a share in \[0\.5, 1\)"):
        BootstrapConfig(level=95)
    with pytest.raises(UserError, match=r"statistics\.resamples: expected 200 or more, got 10"):
        BootstrapConfig(resamples=10)
    with pytest.raises(ValueError, match="expected finite values"):
        ratio(torch.tensor([1.0, math.nan]), torch.ones(2))


def test_paired_differences_have_ends_where_hardly_a_unit_differs() -> None:
    """One of 150 units differs: the paired interval alone has ends beyond all differences."""
    a, b, counts = (torch.zeros(150, dtype=torch.float64) for _ in range(3))
    a[0], counts[:] = 0.9, 1
    b[:] = 1e-4
    alone = ratio(a - b, counts)
    assert alone.high > 0.5
    got = paired_difference(a, b, counts)
    assert 0 < got.low < got.mean < got.high < 0.05


def test_paired_differences_are_those_of_their_ratio_where_many_units_differ() -> None:
    draw = torch.Generator().manual_seed(0)
    both = torch.rand(200, generator=draw).double()
    a, counts = (both + 0.2).clamp(max=1), torch.ones(200, dtype=torch.float64)
    assert torch.equal(
        torch.stack(paired_difference(a, both, counts)), torch.stack(ratio(a - both, counts))
    )


def test_a_model_equal_to_floor_or_ceiling_has_a_share_without_ends() -> None:
    """No question shows how much others would differ: [0, 0] would claim to know it exactly."""
    ceiling = torch.tensor([1.0] * 8 + [0.0] * 22)
    floor = torch.zeros(30)
    shares = recovered(torch.stack([floor, ceiling]), floor, ceiling, FAST)
    assert shares.plain() == [
        {"mean": 0, "low": None, "high": None},
        {"mean": 1, "low": None, "high": None},
    ]


def test_strata_are_fixed() -> None:
    """Differences between benchmarks are no sampling error; without strata they count as one."""
    sizes, chances = (200, 40, 30), (0.9, 0.3, 0.1)
    strata = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    weight = torch.cat([torch.full((n,), 1 / n) for n in sizes]).double()
    chance = torch.cat([torch.full((n,), p) for n, p in zip(sizes, chances, strict=True)])
    draw = torch.Generator().manual_seed(0)
    shape = (EXPERIMENTS, len(weight))
    hits = torch.bernoulli(chance.expand(shape), generator=draw) * weight
    wanted = sum(chances) / len(chances)
    within = ratio(hits, weight, bounds=(0, 1), strata=strata, config=FAST)
    pooled = ratio(hits, weight, bounds=(0, 1), config=FAST)
    torch.testing.assert_close(within.mean, pooled.mean)
    assert abs(coverage(within, wanted) - FAST.level) < WITHIN + noise(FAST.level)
    assert coverage(pooled, wanted) > FAST.level + noise(FAST.level)
    assert (within.high - within.low).mean() < 0.9 * (pooled.high - pooled.low).mean()


@pytest.mark.parametrize("sizes", [(29, 29), (57, 57, 57), (26, 26, 26)])
def test_rare_events_have_no_absurd_ends_in_strata(sizes: tuple[int, ...]) -> None:
    """Rounding errors of centring are no spread, by which a distance is divided."""
    strata = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    weight = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in sizes])
    places = zip(sizes, (20, 4, 9), strict=False)  # of the only unit with events in a stratum
    hits = torch.cat([torch.arange(n) == place for n, place in places])
    for sign in (1, -1):
        got = ratio(sign * hits * weight, weight, strata=strata)
        assert (got.high if sign > 0 else got.low).item() == sign * math.inf
        for one, other in zip(got, ratio(sign * hits * weight, weight), strict=True):
            torch.testing.assert_close(one, other)


def test_a_share_of_rare_gains_has_no_absurd_ends() -> None:
    floor = torch.zeros(258, dtype=torch.float64)
    floor[[3, 50, 200]] = 1
    ceiling = torch.zeros(258, dtype=torch.float64)
    ceiling[:205] = 1
    one = torch.zeros(258, dtype=torch.int64)
    share = recovered(torch.zeros(258), floor, ceiling, strata=one)
    assert share.low.item() == -math.inf
    torch.testing.assert_close(share.high, recovered(torch.zeros(258), floor, ceiling).high)


def test_resamples_that_equal_the_estimate_up_to_rounding_are_at_it() -> None:
    """Most units have the ratio of all: without the two others there is neither spread nor gap."""
    x = torch.full((40,), 0.1, dtype=torch.float64)
    x[0], x[1] = 0.0, 0.2
    got = ratio(x, torch.ones(40))
    assert got.low.isfinite()
    assert got.high.isfinite()


@pytest.mark.parametrize("correlation", [-0.9, -0.5, 0.0, 0.5])
def test_paired_differences_cover_however_the_pairs_vary(correlation: float) -> None:
    draw = torch.Generator().manual_seed(1)
    first, noise_of_second = torch.randn(2, 600, 60, generator=draw).double()
    second = correlation * first + math.sqrt(1 - correlation**2) * noise_of_second
    a, b = ((0.5 + 0.12 * each).clamp(0, 1) for each in (first, second))
    got = paired_difference(a, b, torch.ones(60, dtype=torch.float64), FAST)
    inside = ((got.low <= 0) & (got.high >= 0)).double().mean().item()
    assert abs(inside - FAST.level) < WITHIN + 3 * math.sqrt(0.95 * 0.05 / 600)


def test_proportions_that_never_differ_are_compared_as_independent_ones() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    got = paired_difference(zeros, zeros, torch.ones(3, dtype=torch.float64), FAST)
    high = wilson(0, 3).high.item()
    assert got.plain() == {"mean": 0, "low": pytest.approx(-high), "high": pytest.approx(high)}
