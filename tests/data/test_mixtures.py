"""Mixtures: shares of tokens, order, and what is refused."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastadapt.data.mixtures import MixturePlan
from fastadapt.data.sequences import DataConfig
from fastadapt.errors import UserError
from fastadapt.training.config import from_dict


def lengths_of(n: int, mean: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [max(2, round(draw.expovariate(1 / mean))) for _ in range(n)]


def shares(plan: MixturePlan, lengths: list[list[int]], steps: int) -> list[float]:
    flat = [(part, n) for part, of_part in enumerate(lengths) for n in of_part]
    tokens = [0] * len(lengths)
    for step in range(steps):
        for i in plan[step]:
            part, n = flat[i]
            tokens[part] += n
    return [n / sum(tokens) for n in tokens]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (5.0, 1.0, 40.0)])
def test_token_shares_are_the_weights_within_one_percent(weights: tuple[float, ...]) -> None:
    """Sources of long, of short and of mixed texts; 200 steps, as the sizes of a real run."""
    lengths = [lengths_of(900, 1500, 0), lengths_of(700, 60, 1), lengths_of(4000, 300, 2)]
    plan = MixturePlan(lengths, weights, batch_size=16, seed=42)
    wanted = [weight / sum(weights) for weight in weights]
    assert shares(plan, lengths, 200) == pytest.approx(wanted, abs=0.01)
    # The control: drawing sources by weight, without a count of tokens, misses the shares.
    draw = random.Random(0)
    tokens = [0, 0, 0]
    for _ in range(200 * 16):
        part = draw.choices(range(3), weights)[0]
        tokens[part] += draw.choice(lengths[part])
    assert [n / sum(tokens) for n in tokens] != pytest.approx(wanted, abs=0.01)


LONG_AND_RARE = [[20] * 2000, [8000] * 9, [8000] * 9], [0.9, 0.05, 0.05]


@example(*LONG_AND_RARE)
@given(
    st.lists(st.lists(st.integers(2, 50), min_size=1, max_size=9), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
)
def test_tokens_of_a_source_are_near_its_share(
    lengths: list[list[int]], weights: list[float]
) -> None:
    plan = MixturePlan(lengths, weights, batch_size=1, seed=42)
    flat = [(part, n) for part, of_part in enumerate(lengths) for n in of_part]
    shares, longest = [weight / sum(weights) for weight in weights], list(map(max, lengths))
    tokens, shortfall = [0] * len(lengths), 0.0
    for step in range(2 * plan.n):
        ((part, n),) = (flat[i] for i in plan[step])
        tokens[part] += n
        for n, share, text in zip(tokens, shares, longest, strict=True):
            excess = n - share * sum(tokens)
            assert excess < text
            assert -excess <= share * (sum(longest) - text) + 1e-6
            shortfall = max(shortfall, -excess)
    if weights == LONG_AND_RARE[1]:
        assert shortfall > 2 * 20  # more than one of the source's own texts


@given(
    st.lists(st.lists(st.integers(2, 50), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 99),
    st.data(),
)
def test_the_order_is_a_function_of_the_step(
    lengths: list[list[int]], batch_size: int, seed: int, data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.1, 10)) for _ in lengths]
    plan = MixturePlan(lengths, weights, batch_size, seed)
    steps = data.draw(st.permutations(range(2 * plan.n_batches)))
    forward = [plan[step] for step in range(2 * plan.n_batches)]
    again = MixturePlan(lengths, weights, batch_size, seed)
    assert {step: again[step] for step in steps} == dict(enumerate(forward))
    # An epoch repeats no sample, unless it is a single batch larger than the data.
    samples = [i for batch in forward[: plan.n_batches] for i in batch]
    assert max(Counter(samples).values()) == 1 or plan.n < batch_size


def test_another_seed_gives_another_order() -> None:
    lengths = [[10] * 50, [10] * 50]
    first, second = (MixturePlan(lengths, [1, 1], 4, seed) for seed in (1, 2))
    assert [first[i] for i in range(5)] != [second[i] for i in range(5)]


@pytest.mark.parametrize("weight", [0, 0.0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    values = {"train": [{"source": "a.jsonl"}, {"source": "b.jsonl", "weight": weight}]}
    with pytest.raises(
        UserError, match=r"data\.train: weight of 'b\.jsonl': expected a finite number ab"
    ):
        from_dict({**values, "validation": "v"}, DataConfig, "data.")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], r"data\.train: expected at least one source"),
        ([{"weight": 1}], r"data\.train\.source is missing"),
        ([{"source": "a", "wieght": 1}], r"unknown key data\.train\.wieght; did you mean"),
    ],
)
def test_a_mixture_is_a_list_of_sources(train: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict({"train": train, "validation": "v"}, DataConfig, "data.")


def test_sorting_by_length_would_change_the_shares() -> None:
    values = {"train": [{"source": "a"}, {"source": "b"}], "validation": "v", "bucket": 4}
    with pytest.raises(UserError, match=r"data\.bucket: expected 1 with several sources"):
        from_dict(values, DataConfig, "data.")
