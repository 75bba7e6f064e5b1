"""What sets of features do only together: by hand, and on planted contrasts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadapt.evaluation.contrast.places import Rows
from fastadapt.evaluation.contrast.summary import Contrast
from fastadapt.evaluation.contrast.unions import Union, interactions
from fastadapt.evaluation.statistics import BootstrapConfig

FAST = BootstrapConfig(resamples=500)
UNIONS = [Union("ab", ("a", "b"))]


def contrast_of(difference: Tensor) -> Contrast:
    zeros = torch.zeros(len(difference), 1, dtype=torch.float64)
    return Contrast(difference.double()[:, None] + 0.1, zeros + 0.1, zeros)


def rows_at(text: Tensor) -> Rows:
    empty = torch.zeros(0, dtype=torch.int64)
    return Rows(empty, empty, empty, text)


def test_an_interaction_by_hand() -> None:
    levels = {"hybrid": 0.0, "target": 0.8, "none": 0.1, "a": 0.2, "b": 0.1, "ab": 0.5}
    contrasts = {name: contrast_of(torch.full((6,), value)) for name, value in levels.items()}
    rows = rows_at(torch.tensor([0, 0, 1, 2, 3, 3]))
    (got,) = interactions(contrasts, UNIONS, "none", rows, 5, FAST)
    assert got["mean"] == pytest.approx(((0.5 - 0.1) - (0.2 - 0.1) - (0.1 - 0.1)) / 0.8)
    assert interactions(contrasts, [], "none", rows, 5, FAST) == []


@pytest.mark.parametrize("together", [0.3, 0.0])
def test_planted_interactions_are_seen_and_their_control_is_not(together: float) -> None:
    """Effects differ by text; the control's parts add up in each text but for noise."""
    draw = torch.Generator().manual_seed(0)
    text = torch.arange(120).repeat_interleave(3)
    size = (0.5 + torch.rand(120, generator=draw))[text]

    def noisy(level: float) -> Contrast:
        return contrast_of(level * size + 0.05 * torch.randn(len(text), generator=draw))

    levels = {"hybrid": 0.0, "target": 0.9, "none": 0.05, "a": 0.25, "b": 0.15}
    levels["ab"] = levels["a"] + levels["b"] - levels["none"] + together
    contrasts = {name: noisy(level) for name, level in levels.items()}
    (got,) = interactions(contrasts, UNIONS, "none", rows_at(text), 120, FAST)
    assert got["low"] < together / 0.9 < got["high"]
    assert (got["low"] > 0) == (together > 0)
    assert got["high"] - got["low"] < 0.1
