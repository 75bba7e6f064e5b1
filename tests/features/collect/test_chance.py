"""The uniform draw: seeded, independent of order, with equal probability for each activation."""

from __future__ import annotations

import math

import pytest
import torch
from organism_runs import hashed

from fastadapt.features.collect.priority_hash import priority, tokens_hash, units_hash
from fastadapt.features.collect.topk_buffer import Candidates, TopKBuffer, place_of, topk_per_group

SEEDS, K = 1000, 10
CPU = torch.device("cpu")


def test_priorities_equal_those_of_python_integers() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randint(0, 300, (200,), generator=draw)
    text, position = (torch.randint(0, n, (200,), generator=draw) for n in (5000, 10_000))
    for seed, layer in ((0, 0), (5, 27), (2**63 - 1, 3)):
        of_unit = units_hash(seed, "target", layer, 300, CPU)[features]
        actual = priority(of_unit, tokens_hash(text, position)).tolist()
        places = zip(features.tolist(), text.tolist(), position.tolist(), strict=True)
        assert actual == [hashed(seed, 2, layer, *place) for place in places]
        assert min(actual) >= 0


def test_topk_per_group_is_a_sort_of_each_unit() -> None:
    """Includes equal keys, and units with fewer than k entries."""
    draw = torch.Generator().manual_seed(1)
    unit = torch.randint(0, 40, (900,), generator=draw)
    key = torch.randint(0, 12, (900,), generator=draw)
    place = torch.randperm(900, generator=draw)
    order, rank = topk_per_group(unit, key, place, 7)
    rows = list(zip(unit.tolist(), (-key).tolist(), place.tolist(), range(900), strict=True))
    expected = []
    for u in range(40):
        of_unit = sorted(row for row in rows if row[0] == u)[:7]
        expected += [(row[3], r) for r, row in enumerate(of_unit)]
    assert list(zip(order.tolist(), rank.tolist(), strict=True)) == expected


@pytest.mark.parametrize("n", [11, 64, 150])
def test_each_activation_is_drawn_with_equal_probability(n: int) -> None:
    """Over 1,000 seeds, met in batches: a chi-square of how often each of n is among the ten.

    Of draws without replacement, ``Σ (observed - expected)² / (expected (1 - k/n)) · (n-1)/n`` is
    chi-square with n - 1 degrees of freedom (Wilson and Hilferty's cube root makes it normal).
    """
    text, position = torch.arange(n) // 7, torch.arange(n) % 7 * 3
    place, token = place_of(text, position), tokens_hash(text, position)
    buffer = TopKBuffer.empty(SEEDS, K, 1, CPU)  # one unit per seed
    hashes = torch.stack([units_hash(seed, "adapter", 2, 6, CPU)[5] for seed in range(SEEDS)])
    for chunk in torch.randperm(n, generator=torch.Generator().manual_seed(n)).split(13):
        unit = torch.arange(SEEDS).repeat_interleave(len(chunk))
        which = chunk.repeat(SEEDS)
        key = priority(hashes[unit], token[which])
        actual = buffer.may_enter(unit, key)
        value = which[actual].float()
        buffer.merge(
            Candidates(unit[actual], key[actual], place[which[actual]], value, value[:, None])
        )
    assert (buffer.key >= 0).all()
    drawn = torch.bincount(buffer.value.long().flatten(), minlength=n).double()
    assert drawn.sum() == SEEDS * K
    expected = SEEDS * K / n
    chi2 = ((drawn - expected).square() / (expected * (1 - K / n))).sum() * (n - 1) / n
    df = n - 1
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    print(f"n={n}: chi-square {chi2:.1f} on {df} degrees of freedom, z={z:.2f}")
    assert abs(z) < 3


def test_merged_parts_equal_the_whole() -> None:
    draw = torch.Generator().manual_seed(2)
    unit = torch.randint(0, 30, (2000,), generator=draw)
    key = torch.randint(0, 50, (2000,), generator=draw)
    place = torch.randperm(2000, generator=draw)
    value = torch.rand(2000, generator=draw)
    every = Candidates(unit, key, place, value, value[:, None].expand(-1, 4))
    whole = TopKBuffer.empty(30, 20, 4, CPU)
    whole.merge(every)
    parts = []
    for part in range(3):
        mine = (torch.arange(2000) % 3 == part).nonzero().flatten()
        buffer = TopKBuffer.empty(30, 20, 4, CPU)
        for chunk in mine.split(100):
            buffer.merge(
                Candidates(unit[chunk], key[chunk], place[chunk], value[chunk], every.window[chunk])
            )
        parts.append(buffer)
    merged = TopKBuffer.empty(30, 20, 4, CPU)
    for buffer in reversed(parts):
        merged.merge(buffer.candidates(torch.arange(30)))
    actual, expected = (k.candidates(torch.arange(30)) for k in (merged, whole))
    for name in ("unit", "key", "place", "value", "window"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(expected.window, expected.value[:, None].expand(-1, 4))
