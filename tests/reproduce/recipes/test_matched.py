"""Values at equal L0: interpolation by hand-computed numbers, and coverage of the intervals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastadapt.evaluation.statistics import Intervals, ratio
from reproduce.recipes.matched import Curve, change, interval, log_kl_at, middle, value_at


def curve_of(l0: list[list[float]], kl: list[list[float]], n: int = 4) -> Curve:
    """Return runs ``[S, V]`` on n equal texts of 10 tokens and 9 predictions."""
    ones = torch.ones(n, dtype=torch.float64)
    active, sums = (torch.tensor(x, dtype=torch.float64)[..., None] for x in (l0, kl))
    return Curve(sums * 9 * ones, 9 * ones, active * 10 * ones, 10 * ones)


def test_interpolation_is_linear_in_both_logarithms() -> None:
    # From (1, 0.8) to (4, 0.2): the slope is -1. From (4, 0.2) to (16, 0.1): it is -1/2.
    curve = curve_of([[4.0, 1.0, 16.0]], [[0.2, 0.8, 0.1]])
    for l0, kl in ((1, 0.8), (2, 0.4), (4, 0.2), (9, 0.2 / 1.5), (16, 0.1)):
        values = log_kl_at(curve, l0)
        assert values.shape == (1, 4)
        assert values.mean().exp().item() == pytest.approx(kl, rel=1e-12)


def test_each_seed_has_its_own_neighbours() -> None:
    curve = curve_of([[1.0, 4.0, 16.0], [1.5, 2.5, 16.0]], [[0.8, 0.2, 0.1], [0.6, 0.3, 0.1]])
    first, second = log_kl_at(curve, 2.0).mean(-1).exp().tolist()
    assert first == pytest.approx(0.4)
    assert second == pytest.approx(0.6 * (0.3 / 0.6) ** (math.log(2 / 1.5) / math.log(2.5 / 1.5)))


def test_the_l0_of_a_run_is_reached() -> None:
    # Like topk with k = 1, 3 and 7, but for rounding that puts the last run beyond 7, or before 1.
    tokens = torch.tensor([7.0, 11.0, 13.0])
    active = torch.tensor([1.0, 3.0, 7.0])[:, None] * tokens * 30 / 30.0
    curve = Curve(1 / active[None], torch.ones(3), active[None] * (1 + 1e-13), tokens)
    assert all(log_kl_at(curve, l0).isfinite().all() for l0 in (1.0, 3.0, 7.0))


@pytest.mark.parametrize("l0", [0.99, 16.01])
def test_nothing_is_extrapolated(l0: float) -> None:
    curve = curve_of([[1.0, 4.0, 16.0], [0.5, 4.0, 20.0]], [[0.8, 0.2, 0.1], [0.9, 0.2, 0.1]])
    values = log_kl_at(curve, l0)
    assert values[0].isnan().all()
    assert values[1].isfinite().all()
    nothing = {"mean": None, "low": None, "high": None}
    assert interval(values).plain() == nothing
    assert change(curve, curve, l0).plain() == nothing
    assert value_at(torch.ones(2, 3), curve, l0) is None


def test_equal_l0s_are_no_range() -> None:
    curve = curve_of([[3.0, 3.0, 3.0]], [[0.2, 0.3, 0.1]])
    assert log_kl_at(curve, 2.0).isnan().all()
    assert log_kl_at(curve, 4.0).isnan().all()
    silent = curve_of([[0.0, 1.0, 4.0]], [[0.9, 0.8, 0.2]])
    assert log_kl_at(silent, 0.5).isnan().all()  # no logarithm of 0
    assert log_kl_at(silent, 2.0).mean().exp().item() == pytest.approx(0.4)


def test_other_values_are_linear_in_the_logarithm_of_l0() -> None:
    curve = curve_of([[1.0, 4.0, 16.0], [1.0, 4.0, 16.0]], [[0.8, 0.2, 0.1], [0.8, 0.2, 0.1]])
    values = torch.tensor([[0.1, 0.3, 0.7], [0.2, 0.4, 0.8]], dtype=torch.float64)
    assert value_at(values, curve, 2.0) == pytest.approx(0.25)
    assert value_at(values, curve, 8.0) == pytest.approx(0.55)
    assert value_at(values, curve, 16.0) == pytest.approx(0.75)
    values[1] = torch.nan  # not measured of every seed
    assert value_at(values, curve, 2.0) == pytest.approx(0.2)
    values[0] = torch.nan
    assert value_at(values, curve, 2.0) is None


def test_a_change_is_that_of_the_interpolated_values() -> None:
    baseline = curve_of([[1.0, 4.0, 16.0]] * 2, [[0.8, 0.2, 0.1], [0.4, 0.1, 0.05]])
    other = curve_of([[1.0, 8.0, 16.0]] * 2, [[0.4, 0.05, 0.05], [0.2, 0.025, 0.025]])
    # At L0 2: the baseline has 0.4 and 0.2, the other one 0.2 and 0.1: half in both seeds.
    assert [end.item() for end in change(other, baseline, 2.0)] == pytest.approx([-0.5] * 3)
    assert middle(baseline) == pytest.approx(4.0)


def test_one_seed_has_the_interval_of_its_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = torch.rand(1, 3, 50, generator=generator, dtype=torch.float64) * torch.tensor(
        [[[4.0], [2.0], [1.0]]]
    )
    ones = torch.ones(50)
    active = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1).expand(1, 3, 50)
    got = interval(log_kl_at(Curve(kl, ones, active, ones), 2.0))
    want = ratio(kl[0, 1], ones)
    assert got.mean.item() == pytest.approx(want.mean.item())
    for ours, theirs in zip(got, want, strict=True):  # of a logarithm, so not the same
        assert ours.item() == pytest.approx(theirs.item(), rel=0.03)


# --- coverage ---

TEXTS, SEEDS, LEVELS = 60, 3, (1.0, 2.5, 6.0)
BETA, GAIN, AT = 0.7, -0.1, 2.0


def positive(shape: tuple[int, ...], spread: float, generator: torch.Generator) -> Tensor:
    """Return log-normal factors of mean 1."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (spread * normal - spread**2 / 2).exp()


def draw(
    n: int, gain: float, common: tuple[Tensor, Tensor], noise: float, generator: torch.Generator
) -> Curve:
    """Return runs of n experiments whose KL at an L0 is ``exp(gain) L0^-β``.

    ``common`` has the factors of seeds ``[n, S, 1, 1]`` and texts ``[n, 1, 1, texts]``.
    """
    shape = (n, SEEDS, len(LEVELS))
    l0 = torch.tensor(LEVELS, dtype=torch.float64)[:, None] * positive((*shape, 1), 0.1, generator)
    of_run = (noise * torch.randn((*shape, 1), generator=generator, dtype=torch.float64)).exp()
    of_texts = common[1] * positive((*shape, TEXTS), 0.3, generator)
    kl = math.exp(gain) * l0**-BETA * common[0] * of_run * of_texts
    active = l0 * positive((*shape, TEXTS), 0.2, generator)
    ones = torch.ones(TEXTS, dtype=torch.float64)
    return Curve(kl, ones, active, ones)


def coverage(intervals: Intervals, truth: float) -> float:
    return ((intervals.low <= truth) & (intervals.high >= truth)).double().mean().item()


@pytest.mark.parametrize(("seed_spread", "noise"), [(0.0, 0.0), (0.1, 0.02), (0.3, 0.1)])
def test_intervals_cover_the_truth(seed_spread: float, noise: float) -> None:
    """Of curves that are lines in logarithms, at an L0 between their runs."""
    generator = torch.Generator().manual_seed(round(100 * seed_spread))
    n = 1500
    seeds = (
        seed_spread * torch.randn((n, SEEDS, 1, 1), generator=generator, dtype=torch.float64)
    ).exp()
    common = seeds, positive((n, 1, 1, TEXTS), 0.6, generator)
    baseline = draw(n, 0.0, common, noise, generator)
    other = draw(n, GAIN, common, noise, generator)
    values = log_kl_at(baseline, AT)
    inside = values.isfinite().all(-1).all(-1)
    assert inside.double().mean() > 0.99
    level = interval(values[inside])
    assert 0.925 < coverage(level, AT**-BETA) < 0.975
    gain = interval((log_kl_at(other, AT) - values)[inside], torch.expm1)
    assert 0.925 < coverage(gain, math.expm1(GAIN)) < 0.975
    if seed_spread:  # seeds and texts are paired, so that a gain is known better than a level
        assert (gain.high - gain.low).median() < (level.high - level.low).median()


def test_ignoring_that_l0_is_measured_covers_too_little() -> None:
    """The control: with L0s that are taken as exact, intervals of one level are too short."""
    generator = torch.Generator().manual_seed(3)
    n, shape = 1500, (1500, SEEDS, len(LEVELS), TEXTS)
    ones = torch.ones(TEXTS, dtype=torch.float64)
    texts = positive((n, 1, 1, TEXTS), 0.8, generator)
    l0 = torch.tensor(LEVELS, dtype=torch.float64)[:, None]
    kl = l0**-2.0 * positive(shape, 0.1, generator)
    active = l0 * texts.expand(shape)
    curve = Curve(kl, ones, active, ones)
    exact = curve._replace(active=active.mean(-1, keepdim=True).expand(shape))
    right, wrong = (coverage(interval(log_kl_at(each, AT)), AT**-2.0) for each in (curve, exact))
    assert 0.92 < right < 0.98
    assert wrong < 0.5
