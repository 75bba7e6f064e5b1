"""Shards: no text can end the script, and the number of files is bounded."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastadapt.features.site.columns import parts
from fastadapt.features.site.pages import STATIC, units_per_shard
from fastadapt.features.site.shards import integers, shard


def test_a_shard_has_no_character_that_could_end_a_script() -> None:
    text = '</script><!--\u2028\u2029"\\`${x}\x00'
    script = shard("site", "0" * 32, {"text": text}, {"a": np.arange(3, dtype="<u4")})
    assert re.fullmatch(rb'fastadapt\.shard\("site","0+","[A-Za-z0-9+/=]+"\);\n', script)


def test_counts_of_any_size_are_exact() -> None:
    small, large = np.array([0.0, 2**32 - 2]), np.array([0.0, 2**40 + 1])
    assert integers(small).dtype == np.uint32
    assert integers(small).tolist() == [0, 2**32 - 2]
    assert integers(large).dtype == np.float64
    assert integers(large).tolist() == [0, 2**40 + 1]
    assert integers(np.zeros(0)).size == 0


@pytest.mark.parametrize(
    ("shapes", "shards"),
    [
        ([(28, 8192)], 28 * 64),  # 7B
        ([(64, 16384)], 64 * 28),  # 32B
        ([(28, 8192), (28, 18944), (28, 18944)], 84 * 21),  # with the neurons of both models
        ([(4, 512)], 4 * 8),
        ([(1, 3)], 1),
        ([(2000, 8)], None),
    ],
)
def test_files_stay_few(shapes: list[tuple[int, int]], shards: int | None) -> None:
    layers = sum(n_layers for n_layers, _ in shapes)
    n_shards = sum(n * len(list(parts(f, units_per_shard(f, layers)))) for n, f in shapes)
    if shards is None:
        assert n_shards == layers  # one shard per layer
    else:
        assert n_shards == shards
        assert n_shards + layers + len(STATIC) + 5 < 2000
