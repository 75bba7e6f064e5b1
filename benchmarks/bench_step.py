"""A whole training step against the plain one: ``pytest benchmarks/bench_step.py``

The true shape of the 7B pair on a GPU, a small one on a CPU. Both steps are first shown to have the
same losses and gradients (float64, small).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.roofs import measure_roofs
from benchmarks.whole_step import PAPER, SMALL, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = PAPER if DEVICE == "cuda" else SMALL


def test_step(benchmark: Any) -> None:
    roofs = measure_roofs(DEVICE, SIZES.dtype)
    made: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: made.extend(rows(SIZES, DEVICE, roofs)), rounds=1)
    benchmark.group = "whole step"
    benchmark.extra_info["rows"] = made
    assert made
    assert all(row["right"] for row in made)
    timed = {(row["implementation"], row["shape"]["T"]): row for row in made if "median_s" in row}
    (name, T), plain = next(iter(timed.items()))
    if name != "plain":
        pytest.skip("the plain step fits at no length")
    ours = max(r["tokens_per_s"] for (n, t), r in timed.items() if n != "plain" and t == T)
    benchmark.extra_info["times_as_fast_as_plain"] = ours / plain["tokens_per_s"]
    if DEVICE == "cuda":
        assert ours >= 2 * plain["tokens_per_s"]
