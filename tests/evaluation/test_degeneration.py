"""The degeneration rule, compared with its definition, on planted loops and on sound texts."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from looping_texts import SOUND, planted_loop, tokenize

from fastadapt.errors import UserError
from fastadapt.evaluation.generation.degeneration import (
    DegenerationConfig,
    DegenerationDetector,
    find_cut,
)

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"
N_SOUND, N_LOOPS = (2000, 200) if PROOF else (200, 100)


def cut_by_definition(tokens: Sequence[int], config: DegenerationConfig) -> int | None:
    """Search every window for every n-gram, with occurrences counted from the left."""
    for left in range(len(tokens) - config.window + 1):
        window = tokens[left : left + config.window]
        for n in config.ngrams:
            grams = [tuple(window[i : i + n]) for i in range(len(window) - n + 1)]
            for gram in set(grams):
                count = i = 0
                while i < len(grams):
                    count, i = (count + 1, i + n) if grams[i] == gram else (count, i + 1)
                if count >= config.min_count and n * count / config.window > config.share:
                    return left
    return None


@settings(max_examples=400)
@example(tokens=[1] * 8, window=8, share=0.5, ngrams=[3], min_count=3)  # overlapping thrice
@example(tokens=[1] * 9, window=9, share=0.5, ngrams=[3], min_count=3)
@given(
    tokens=st.lists(st.integers(0, 1), max_size=60) | st.lists(st.integers(0, 5), max_size=60),
    window=st.integers(4, 24),
    share=st.sampled_from((0.2, 0.25, 0.4, 0.5, 0.7)),
    ngrams=st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True),
    min_count=st.integers(2, 4),
)
def test_streaming_is_the_definition(
    tokens: list[int], window: int, share: float, ngrams: list[int], min_count: int
) -> None:
    config = DegenerationConfig(window, share, tuple(ngrams), min_count)
    cut = cut_by_definition(tokens, config)
    assert find_cut(tokens, config) == cut
    # feed() returns True from the token that completes the window.
    detector = DegenerationDetector(config)
    returned = [detector.feed(token) for token in tokens]
    complete = len(tokens) if cut is None else cut + window - 1
    assert returned == [i >= complete for i in range(len(tokens))]


@pytest.mark.parametrize("ngrams", [(10, 24), (2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20)])
def test_streaming_is_the_definition_at_the_default_window(ngrams: tuple[int, ...]) -> None:
    config = DegenerationConfig(ngrams=ngrams)
    for seed in range(3):
        rng = random.Random(seed)
        tokens, start = planted_loop(rng, rng.randint(1, 60), 0.02)
        tokens = tokens[max(0, start - 100) : start + 250]
        assert find_cut(tokens, config) == cut_by_definition(tokens, config)


def test_planted_loops_are_detected() -> None:
    """Loops of periods 1 to 60, each token replaced with a probability of up to 3%."""
    detected = 0
    for seed in range(N_LOOPS):
        rng = random.Random(f"loop {seed}")
        tokens, start = planted_loop(rng, seed % 60 + 1, rng.uniform(0, 0.03))
        cut = find_cut(tokens)
        detected += cut is not None and cut >= start - DegenerationConfig().window
    assert detected >= 0.99 * N_LOOPS


def test_sound_texts_are_rarely_cut() -> None:
    flagged = 0
    for seed in range(N_SOUND):
        text = SOUND[seed % len(SOUND)](random.Random(f"sound {seed}"))
        flagged += find_cut(tokenize(text)) is not None
    assert flagged <= 0.005 * N_SOUND


def test_small_ngrams_take_tables_for_loops() -> None:
    """The reason why the default set has no small n."""
    tables = [tokenize(SOUND[0](random.Random(seed))) for seed in range(60)]
    assert sum(find_cut(t, DegenerationConfig(ngrams=(2,))) is not None for t in tables) > 20


def test_work_is_linear_in_the_length() -> None:
    def steps(length: int) -> int:
        rng = random.Random(0)
        unit = [rng.randrange(3) for _ in range(40)]
        detector = DegenerationDetector()
        for i in range(length):
            # Repetitive but never degenerate: pieces of one unit that are too short.
            assert not detector.feed(unit[i % 40] if i % 13 else rng.randrange(100, 9999))
        return detector.steps

    few, many = steps(4_000), steps(32_000)
    assert many == pytest.approx(8 * few, rel=0.05)


@pytest.mark.parametrize(("n", "period"), [(24, 88), (20, 90), (15, 61), (10, 38), (5, 19), (2, 7)])
def test_the_longest_period_that_each_ngram_detects(n: int, period: int) -> None:
    config = DegenerationConfig(ngrams=(n,))
    for p in (period, period + 1):
        cut = find_cut([i % p for i in range(800)], config)
        assert (cut is not None) == (p == period)


def test_a_short_response_has_no_window() -> None:
    assert find_cut([1] * 199) is None
    assert find_cut([1] * 200) == 0


def test_needed_occurrences_are_those_of_the_documentation() -> None:
    config = DegenerationConfig(ngrams=(2, 3, 5, 10, 15, 20, 30))
    assert [config.needed(n) for n in config.ngrams] == [26, 17, 11, 6, 4, 3, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0},
        {"share": 1.0},
        {"share": 0},
        {"min_count": 1},
        {"ngrams": ()},
        {"ngrams": (0,)},
        {"ngrams": (201,)},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match="degeneration"):
        DegenerationConfig(**settings)
