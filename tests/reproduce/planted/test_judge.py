"""The judge: a unit must show where a difference is, and what it writes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from reproduce.planted.judge import LEAST, Judge, Unit, chance

#: Two differences at positions 0..19 and 20..39 of 400, which write tokens 3 and 5 or 6.
PLANTED = torch.zeros(2, 400, dtype=torch.bool)
PLANTED[0, :20] = True
PLANTED[1, 20:40] = True
JUDGE = Judge(PLANTED, [frozenset({3}), frozenset({5, 6})], 424)
ELSEWHERE = list(range(100, 120))


@pytest.mark.parametrize(
    ("contexts", "promoted", "described"),
    [
        (range(20), range(10), [0]),
        (range(20, 40), range(10), [1]),
        (range(10, 30), range(10), [0, 1]),  # half of each
        ([*range(10), *ELSEWHERE[:10]], range(10), [0]),
        ([*range(9), *ELSEWHERE[:11]], range(10), []),  # less than half
        (range(20), range(10, 20), []),  # where, not what
        (ELSEWHERE, range(10), []),  # what, not where
        (range(20), range(20, 40), []),  # no position of the first after the tenth token counts
        (range(LEAST), range(10), [0]),
        (range(LEAST - 1), range(10), []),
        ([*ELSEWHERE, *range(20)], range(10), []),  # a reader sees the first 20
    ],
)
def test_a_description_needs_where_and_what(
    contexts: range, promoted: range, described: list[int]
) -> None:
    assert JUDGE.describes(Unit("a", list(contexts), list(promoted))) == described


def test_many_words_of_a_difference_need_many_hits() -> None:
    judge = Judge(PLANTED[:1], [frozenset(range(48))], 424)
    hits = [
        judge.describes(Unit("a", range(20), [*range(n), *range(100, 110 - n)])) for n in range(11)
    ]
    assert hits == [[]] * 4 + [[0]] * 7


@pytest.mark.parametrize(
    ("promoted", "described"), [([50], []), ([3], [0]), ([3, 50], []), ([3, 4], [0]), ([], [])]
)
def test_units_of_one_token_can_describe_any_difference(
    promoted: list[int], described: list[int]
) -> None:
    """By chance, one random token is a word of this difference more often than 5%."""
    judge = Judge(PLANTED[:1], [frozenset(range(48))], 424)
    assert chance(1, 1, 48, 424) > 0.05
    assert judge.describes(Unit("a", range(20), promoted)) == described


def test_other_judges_know_the_places_and_not_the_words() -> None:
    planted = torch.cat([PLANTED, PLANTED[:1].roll(40, dims=1)])
    judge = Judge(planted, [frozenset({3}), frozenset({5, 6}), frozenset({7})], 424)
    others = judge.with_words_of_others()
    assert [judge.outputs for judge in others] == [
        [frozenset({5, 6}), frozenset({7}), frozenset({3})],
        [frozenset({7}), frozenset({3}), frozenset({5, 6})],
    ]
    unit = Unit("a", range(20), [3, *range(100, 109)])
    assert judge.describes(unit) == [0]
    assert [each.describes(unit) for each in others] == [[], []]
    confused = Unit("b", range(20), [3, 7, *range(100, 108)])  # names two differences at once
    assert [each.describes(confused) for each in others] == [[], [0]]


def test_chance_is_the_share_of_all_draws() -> None:
    draws = list(combinations(range(9), 4))
    for marked in range(10):
        for hits in range(5):
            share = sum(sum(i < marked for i in d) >= hits for d in draws) / len(draws)
            assert chance(hits, 4, marked, 9) == pytest.approx(share)
