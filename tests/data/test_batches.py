"""Batches are padded correctly, and their order depends on the step only."""

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastadapt.data.batches import BatchPlan, bucket, collate, cut, padded_width
from fastadapt.data.sequences import DataConfig, Sample


def sample(index: int, *ids: int, first_label: int = 0) -> Sample:
    labels = [-100] * first_label + list(ids[first_label:])
    return Sample(index, torch.tensor(ids), torch.tensor(labels))


def test_shorter_samples_are_padded_on_the_right() -> None:
    batch = collate([sample(0, 5, 6), sample(1, 7, 8, 9, 4, first_label=2)], pad_token_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 3, 3], [7, 8, 9, 4]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.labels.tolist() == [[5, 6, -100, -100], [-100, -100, 9, 4]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool


def test_a_real_token_that_equals_the_padding_still_counts() -> None:
    batch = collate([sample(0, 3, 3, 3), sample(1, 3, 3)], pad_token_id=3)
    assert batch.real.tolist() == [[True] * 3, [True, True, False]]
    assert batch.labels.tolist() == [[3, 3, 3], [3, 3, -100]]


def test_without_padding_there_is_no_mask() -> None:
    batch = collate([sample(0, 1, 2), sample(1, 3, 4)], pad_token_id=0)
    assert batch.attention_mask is None
    assert batch.real.all()


def test_batches_are_padded_to_a_multiple() -> None:
    samples = [sample(0, 5, 6), sample(1, 7, 8, 9, 4, 6)]
    batch, plain = collate(samples, 3, multiple=4), collate(samples, 3)
    assert batch.input_ids.shape == (2, 8)
    assert torch.equal(batch.input_ids[:, :5], plain.input_ids)
    assert torch.equal(batch.labels[:, :5], plain.labels)
    assert torch.equal(batch.real[:, :5], plain.real)
    assert (batch.input_ids[:, 5:] == 3).all()
    assert (batch.labels[:, 5:] == -100).all()
    assert not batch.real[:, 5:].any()
    alone = collate(samples[1:], 3, multiple=4)
    assert alone.real.tolist() == [[True] * 5 + [False] * 3]
    assert collate(samples[1:], 3, multiple=5).attention_mask is None


def test_a_gpu_sees_few_widths() -> None:
    data = DataConfig("train", "validation")  # sequences of up to 10,000 tokens, as in the paper
    lengths = range(2, data.max_tokens + 1)
    widths = {padded_width(n, data.multiple("cuda")) for n in lengths}
    assert len(widths) <= 80
    assert all(width % 128 == 0 for width in widths)
    assert [padded_width(n, data.multiple("cpu")) for n in lengths] == list(lengths)
    assert DataConfig("train", "validation", pad_to=64).multiple("cpu") == 64


def test_collate_copies() -> None:
    one = sample(0, 1, 2)
    collate([one], pad_token_id=0).input_ids.fill_(9)
    assert one.input_ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "expected at least one, got none"),
        ([sample(0, 1, 2), sample(4, 1)], r"sample 4 has 1 token\(s\); at least 2"),
        ([Sample(2, torch.zeros(0, dtype=torch.int64), torch.zeros(0))], r"sample 2 has 0 token"),
    ],
)
def test_what_cannot_be_collated_is_refused(samples: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(samples, pad_token_id=0)


@given(n=st.integers(1, 200), size=st.integers(1, 33), seed=st.integers(0, 2**63))
def test_an_epoch_sees_every_sample_once(n: int, size: int, seed: int) -> None:
    plan = BatchPlan(n, size, seed)
    batches = [plan[step] for step in range(plan.n_batches)]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size


@given(n=st.integers(1, 60), size=st.integers(1, 9), steps=st.lists(st.integers(0, 300)))
def test_a_batch_depends_on_its_step_alone(n: int, size: int, steps: list[int]) -> None:
    """A plan resumed at any step gives the batches of an uninterrupted plan."""
    plan = BatchPlan(n, size, seed=1)
    for step in steps:
        assert plan[step] == BatchPlan(n, size, seed=1)[step]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    plan = BatchPlan(100, 100, seed=0)
    orders = [plan[0], plan[1], plan[2], BatchPlan(100, 100, seed=1)[0]]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(100)]}) == 5


def test_the_order_is_the_same_in_every_version() -> None:
    assert BatchPlan(8, 3, seed=42)[0] == [7, 2, 5]
    assert BatchPlan(8, 3, seed=42)[5] == [0, 5]


@pytest.mark.parametrize(
    ("n", "size", "message"),
    [(0, 1, "n: expected at least 1, got 0"), (3, 0, "batch_size: expected at least 1, got 0")],
)
def test_an_empty_plan_is_refused(n: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(n, size, seed=0)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(IndexError, match="expected 0 or more, got -1"):
        BatchPlan(3, 1, seed=0)[-1]


# --- batches of similar length --------------------------------------------------------------------


@given(
    n=st.integers(1, 120),
    size=st.integers(1, 9),
    window=st.integers(1, 7),
    seed=st.integers(0, 2**63),
)
def test_an_epoch_of_buckets_sees_every_sample_once(
    n: int, size: int, window: int, seed: int
) -> None:
    lengths = [(i * 7919) % 97 for i in range(n)]
    plan = BatchPlan(n, size, seed, lengths=lengths, window=window)
    for epoch in range(2):
        batches = [plan[epoch * plan.n_batches + i] for i in range(plan.n_batches)]
        assert sorted(i for batch in batches for i in batch) == list(range(n))
        assert all(len(batch) == size for batch in batches[:-1])
        assert len(batches[-1]) == (n - 1) % size + 1
    again = BatchPlan(n, size, seed, lengths=lengths, window=window)
    assert [again[i] for i in reversed(range(again.n_batches))] == [
        plan[i] for i in reversed(range(plan.n_batches))
    ]


@pytest.mark.parametrize(("n", "size", "window"), [(5, 2, 2), (6, 2, 2), (6, 2, 3), (7, 3, 2)])
def test_no_sample_is_likelier_in_any_batch_for_its_length(n: int, size: int, window: int) -> None:
    """Over all permutations and all orders of batches, each sample is in each batch equally often.

    A plan without buckets has this property, and ``permutation`` draws uniformly.
    """
    lengths = list(range(n))
    whole = n - n % size
    counts: Counter[tuple[int, int]] = Counter()
    draws = 0
    for order in itertools.permutations(range(n)):
        batches = bucket(order[:whole], lengths, size, window)
        for places in itertools.permutations(range(len(batches))):
            draws += 1
            for place, batch in enumerate([batches[i] for i in places] + cut(order[whole:], size)):
                counts.update((sample, place) for sample in batch)
    for sample in range(n):
        for place in range(-(-n // size)):
            width = size if place < whole // size else n % size
            assert counts[sample, place] * n == draws * width


def test_the_longest_sample_is_anywhere_in_drawn_epochs() -> None:
    """The batch of the shortest, the middle and the longest sample is uniform over 2,000 epochs."""
    n, size = 21, 4
    plan = BatchPlan(n, size, 0, lengths=list(range(n)), window=3)
    epochs = 2000
    for sample in (0, 10, n - 1):
        places = Counter(
            next(i for i in range(6) if sample in plan[epoch * 6 + i]) for epoch in range(epochs)
        )
        expected = [epochs * size / n] * 5 + [epochs / n]
        chi_squared = sum((places[i] - e) ** 2 / e for i, e in enumerate(expected))
        assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001


def test_buckets_pad_less() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 1000) for _ in range(640)]

    def padded(window: int) -> float:
        plan = BatchPlan(640, 8, 0, lengths=lengths, window=window)
        return sum(8 * max(lengths[i] for i in plan[step]) for step in range(80)) / sum(lengths)

    assert padded(1) > 1.6
    assert padded(10) < 1.1


def test_a_window_of_one_is_the_plain_order() -> None:
    lengths = list(range(30))
    plain, windowed = BatchPlan(30, 4, 7), BatchPlan(30, 4, 7, lengths=lengths, window=1)
    assert [plain[i] for i in range(20)] == [windowed[i] for i in range(20)]


def test_the_order_of_buckets_is_the_same_in_every_version() -> None:
    plan = BatchPlan(8, 3, seed=42, lengths=[5, 1, 7, 3, 2, 8, 6, 4], window=2)
    assert [plan[i] for i in range(3)] == [[3, 7, 0], [6, 2, 5], [4, 1]]


@pytest.mark.parametrize("lengths", [None, [1, 2]])
def test_buckets_need_the_lengths(lengths: list[int] | None) -> None:
    with pytest.raises(ValueError, match="lengths: expected 3, one per sample, got"):
        BatchPlan(3, 1, 0, lengths=lengths, window=2)
