"""Hints appear for the runs that need them, and for no others."""

from __future__ import annotations

from typing import Any

import pytest

from fastadapt.training.logs.hints import hints


def record(l0: float, n: int = 256, dead: int = 6, **more: Any) -> dict[str, Any]:
    counts = {"log10_edges": [-2.0, -1.0, 0.0], "counts": [[n - dead - 10, 10]]}
    return {
        "kl_hybrid": 1.4,
        "l0_mean": l0,
        "n_dead_per_layer": [dead],
        "feature_density_histogram": counts,
        **more,
    }


@pytest.mark.parametrize(("l0", "is_odd"), [(25.6, False), (25.7, True), (120.0, True)])
def test_an_adapter_of_many_active_features_is_hinted_at(l0: float, is_odd: bool) -> None:
    lines = hints(record(l0), 1e-3)
    assert bool(lines) == is_odd
    if is_odd:
        assert f"{100 * l0 / 256:.1f}% of the 256 features" in lines[0]
        assert "Raise objective.sparsity (now 0.001)" in lines[0]
    assert hints(record(l0), 0.0) == []  # dense on purpose
    assert hints(record(l0, step=0), 1e-3) == []  # before training, half of the features fire


@pytest.mark.parametrize(("l0", "side"), [(4.5, ""), (5.5, ""), (4.4, "below"), (120.0, "above")])
def test_a_missed_target_is_hinted_at(l0: float, side: str) -> None:
    """Without a target, only the last of these is odd."""
    lines = hints(record(l0, sparsity_weight=0.0234), 1e-3, 5.0)
    share = f"{100 * abs(l0 / 5 - 1):.1f}%"
    expected = f"{share} {side} objective.l0 5.00. Train longer, or start from objective.sparsity"
    assert [line.partition(" 0.0234")[0][-len(expected) :] for line in lines] == [expected][
        : len(side)
    ]
    assert hints(record(l0, step=0), 1e-3, 5.0) == []
    assert bool(hints(record(l0), 1e-3)) == (l0 == 120)


@pytest.mark.parametrize(
    ("kl", "is_odd"), [(0.0, True), (3e-9, True), (1e-3, False), (None, False)]
)
def test_a_hybrid_that_is_the_target_is_hinted_at(kl: float | None, is_odd: bool) -> None:
    for step in ({}, {"step": 0}):
        lines = hints(record(1.0, kl_hybrid=kl, **step))
        assert [
            line.startswith("The hybrid's KL to the target is already 0") for line in lines
        ] == [True] * is_odd


def test_a_baseline_has_no_features() -> None:
    assert hints({"kl_hybrid": 1.4, "l0_mean": None}) == []
