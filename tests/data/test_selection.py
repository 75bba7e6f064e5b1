"""Quotas, keys, filters and splits of a selection, on small examples."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastadapt.data.contents import Content, Role, Turn
from fastadapt.data.families import FAMILIES
from fastadapt.data.prepare.selection import (
    HELD_OUT,
    NO_END,
    NO_THINK,
    REPEATED,
    TOO_LONG,
    Candidate,
    PrepareConfig,
    Selection,
    Shortlist,
    apportion,
    content_hashes,
    draw,
    lacks_thinking,
    length_histogram,
    parse_shares,
    prompt_hash,
    row_key,
)
from fastadapt.errors import UserError


def candidate(
    key: int, domain: str = "math", prompt: str | None = None, conversation: str | None = None
) -> Candidate:
    prompt, conversation = prompt or f"p{domain}{key}", conversation or f"c{domain}{key}"
    return Candidate(key, key, domain, prompt, conversation, 10, 1)


def test_the_quotas_of_the_paper() -> None:
    quotas = PrepareConfig().quotas()
    assert quotas["train"] == {"math": 35_436, "code": 10_410, "science": 4_154}
    assert quotas["validation"] == {"math": 3_544, "code": 1_041, "science": 415}
    assert sum(quotas["train"].values()) == 50_000
    assert sum(quotas["validation"].values()) == 5_000


@given(
    n=st.integers(0, 10**6),
    shares=st.dictionaries(
        st.text("abc", min_size=1), st.fractions(Fraction(1, 1000), 1), min_size=1
    ),
)
def test_quotas_add_up_and_are_within_one_of_their_share(
    n: int, shares: dict[str, Fraction]
) -> None:
    counts = apportion(n, shares)
    assert sum(counts.values()) == n
    total = sum(shares.values())
    assert all(abs(counts[d] - n * shares[d] / total) < 1 for d in shares)


def test_without_domains_every_row_has_the_same_one() -> None:
    assert PrepareConfig(shares="none", train=7).quotas()["train"] == {"rows": 7}


def test_shares_are_exact() -> None:
    assert parse_shares("math=.7, code=1/3") == {"math": Fraction(7, 10), "code": Fraction(1, 3)}


@pytest.mark.parametrize("text", ["", "math", "math=0", "math=-1", "math=x", "a=1,a=1", "=1"])
def test_other_shares_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shares: expected domain=share"):
        parse_shares(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 0}, "--train: expected 1 or more, got 0"),
        ({"validation": -1}, "--validation: expected 0 or more"),
        ({"max_tokens": 1}, "--max_tokens: expected 2 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"reserve": 0.5}, "--reserve: expected 1 or more, got 0.5"),
        ({"reserve": float("nan")}, "--reserve: expected 1 or more"),
        ({"family": "nobody"}, "expected one of"),
        ({"markers": "both"}, "--markers: expected one of text, tokens"),
        ({"thinking": "some"}, "--thinking: expected one of required, any"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrepareConfig(**changes)


def test_keys_are_the_same_in_every_version() -> None:
    assert row_key(42, 0) == 5672782413942647296
    assert row_key(42, 1_199_999) == 3806046940342673144
    assert row_key(43, 0) != row_key(42, 0)


def test_keys_are_uniform_wherever_the_row_stands() -> None:
    """The rows with the lowest tenth of the keys are uniform over 20 sections of the source."""
    n, stretches = 40_000, 20
    lowest = sorted(range(n), key=lambda row: row_key(42, row))[: n // 10]
    counts = Counter(row * stretches // n for row in lowest)
    expected = n / 10 / stretches
    chi_squared = sum((counts[i] - expected) ** 2 / expected for i in range(stretches))
    assert chi_squared < 43.8  # 19 degrees of freedom, p = 0.001


def chat(*texts: str, system: str = "") -> Content:
    roles: tuple[Role, ...] = ("user", "assistant")
    said = tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts))
    return Content(((Turn("system", system),) if system else ()) + said)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (chat("q", "<think> a </think> b"), None),
        (chat("q", " <think></think>"), None),
        (chat("q", "</think> <think> a </think>"), None),
        (chat("q", "no thought"), NO_THINK),
        (chat("q", "a </think> b"), NO_THINK),
        (chat("<think> q </think>", "a"), NO_THINK),
        (chat("q", "<think> a"), NO_END),
        (chat("q", "</think> <think> a"), NO_END),
        (chat("q", "<think> a </ think>"), NO_END),
        (chat("q", "a", "q", "<think> a </think>"), None),
        (chat("q", "<think> a </think>", "q", "a"), None),
        (chat("q", "<think> a", "q", "a </think>"), NO_END),
        (Content(text="a <think> b </think>"), None),
        (Content(text="a"), NO_THINK),
    ],
)
def test_reasoning_is_looked_for(content: Content, expected: str | None) -> None:
    assert lacks_thinking(content) == expected


def test_reasoning_has_the_markers_of_the_family() -> None:
    thinking = FAMILIES["gemma4"].thinking
    assert lacks_thinking(chat("a", "<|channel>thought\nhmm<channel|>b"), thinking) is None
    assert lacks_thinking(chat("a", "<think>\nhmm</think>b"), thinking) is not None


def test_prompts_are_equal_up_to_white_space() -> None:
    assert prompt_hash("a  b\n") == prompt_hash("a b") != prompt_hash("ab")
    assert content_hashes(chat("a b", "c")) == content_hashes(chat("a  b", "c"))
    assert content_hashes(chat("a b", "c")) != content_hashes(chat("a b", "c "))


def test_a_prompt_is_what_the_user_says_first() -> None:
    """Neither system turns nor later rounds make another prompt; they make another conversation."""
    alone, more = chat("a", "b"), chat("a", "b", "c", "d")
    contents = (alone, more, chat("a", "b", system="s"), chat("a", "b", "c", "e"))
    hashes = [content_hashes(content) for content in contents]
    assert {prompt for prompt, _ in hashes} == {prompt_hash("a")}
    assert len({whole for _, whole in hashes}) == 4
    greeting = Content((Turn("assistant", "hello"), Turn("user", "a"), Turn("assistant", "b")))
    assert content_hashes(greeting)[0] != prompt_hash("a")
    assert content_hashes(Content(ids=(1, 2)))[0] != content_hashes(Content(ids=(12,)))[0]


@given(
    keys=st.lists(st.integers(0, 60), max_size=80),
    limit=st.integers(1, 12),
)
def test_a_shortlist_keeps_the_lowest(keys: list[int], limit: int) -> None:
    """Rows may have equal keys, and rows may have been dropped before."""
    shortlist = Shortlist({"math": limit})
    rows = [Candidate(key, i, "math", "", str(i), 10, 1) for i, key in enumerate(keys)]
    for each in rows:
        if shortlist.admits("math", each.key):
            shortlist.add(each)
    assert shortlist.ordered("math") == sorted(rows, key=lambda c: (c.key, c.row))[:limit]
    assert ("math" in shortlist.full) == (len(keys) > limit)


def shortlist_of(*candidates: Candidate, limit: int = 100) -> Shortlist:
    shortlist = Shortlist({"math": limit, "code": limit})
    for each in candidates:
        shortlist.add(each)
    return shortlist


def keys_of(selection: Selection) -> dict[str, list[int]]:
    return {split: [c.key for c in taken] for split, taken in selection.splits.items()}


def quotas(train: tuple[int, int], validation: tuple[int, int]) -> dict[str, dict[str, int]]:
    return {
        "train": {"math": train[0], "code": train[1]},
        "validation": {"math": validation[0], "code": validation[1]},
    }


def test_validation_draws_first_and_both_are_in_the_order_of_the_keys() -> None:
    math = [candidate(key) for key in (1, 4, 5, 8)]
    code = [candidate(key, "code") for key in (2, 3, 7, 9)]
    selection = draw(shortlist_of(*math, *code), quotas((2, 1), (1, 2)))
    assert keys_of(selection) == {"validation": [1, 2, 3], "train": [4, 5, 7]}
    assert selection.missing == {}


def test_training_passes_over_prompts_of_validation_in_any_domain() -> None:
    shortlist = shortlist_of(
        candidate(1, prompt="p"),
        candidate(2, prompt="p"),
        candidate(3),
        candidate(1, "code"),
        candidate(2, "code", prompt="p"),
        candidate(3, "code"),
    )
    selection = draw(shortlist, quotas((1, 1), (1, 1)))
    assert keys_of(selection) == {"validation": [1, 1], "train": [3, 3]}
    assert selection.left_out["math"][HELD_OUT] == selection.left_out["code"][HELD_OUT] == 1


def test_a_prompt_may_come_again_within_a_split() -> None:
    shortlist = shortlist_of(*(candidate(key, prompt="p") for key in (1, 2, 3)))
    selection = draw(shortlist, quotas((3, 0), (0, 0)))
    assert keys_of(selection)["train"] == [1, 2, 3]


def test_the_same_conversation_is_taken_once() -> None:
    shortlist = shortlist_of(
        candidate(1, prompt="p", conversation="c"),
        candidate(2, prompt="p", conversation="c"),
        candidate(3, prompt="p"),
    )
    selection = draw(shortlist, quotas((2, 0), (0, 0)))
    assert keys_of(selection)["train"] == [1, 3]
    assert selection.left_out["math"][REPEATED] == 1


def test_what_a_domain_lacks_is_told() -> None:
    selection = draw(shortlist_of(candidate(1), candidate(2)), quotas((3, 2), (1, 1)))
    assert selection.missing == {
        "validation": {"code": 1},
        "train": {"math": 2, "code": 2},
    }
    assert keys_of(selection) == {"validation": [1], "train": [2]}


def test_only_long_rows_that_were_drawn_are_counted() -> None:
    shortlist = shortlist_of(candidate(3), candidate(7))
    for key in (1, 2, 5, 6, 8):
        shortlist.refuse("math", key, TOO_LONG)
    assert draw(shortlist, quotas((1, 0), (0, 0))).left_out["math"][TOO_LONG] == 2
    assert draw(shortlist, quotas((2, 0), (0, 0))).left_out["math"][TOO_LONG] == 4
    assert draw(shortlist, quotas((3, 0), (0, 0))).left_out["math"][TOO_LONG] == 5


@given(tokens=st.lists(st.integers(1, 97)), longest=st.integers(97, 200))
def test_a_histogram_counts_every_length_once(tokens: list[int], longest: int) -> None:
    assert sum(length_histogram(tokens, longest)) == len(tokens)
    assert length_histogram([1, longest], longest) == [1, *[0] * 8, 1]
