"""Padding, and an order of samples that depends on the step alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastadapt.data.batches import BatchPlan, collate
from fastadapt.data.sequences import Sample


def sample(index: int, *ids: int, first_label: int = 0) -> Sample:
    labels = [-100] * first_label + list(ids[first_label:])
    return Sample(index, torch.tensor(ids), torch.tensor(labels))


def test_shorter_samples_are_padded_on_the_right():
    batch = collate([sample(0, 5, 6), sample(1, 7, 8, 9, 4, first_label=2)], pad_token_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 3, 3], [7, 8, 9, 4]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.labels.tolist() == [[5, 6, -100, -100], [-100, -100, 9, 4]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool


def test_a_real_token_that_equals_the_padding_still_counts():
    batch = collate([sample(0, 3, 3, 3), sample(1, 3, 3)], pad_token_id=3)
    assert batch.real.tolist() == [[True] * 3, [True, True, False]]
    assert batch.labels.tolist() == [[3, 3, 3], [3, 3, -100]]


def test_without_padding_there_is_no_mask():
    batch = collate([sample(0, 1, 2), sample(1, 3, 4)], pad_token_id=0)
    assert batch.attention_mask is None
    assert batch.real.all()


def test_collate_copies():
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
def test_what_cannot_be_collated_is_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        collate(samples, pad_token_id=0)


@given(n=st.integers(1, 200), size=st.integers(1, 33), seed=st.integers(0, 2**63))
def test_an_epoch_sees_every_sample_once(n, size, seed):
    plan = BatchPlan(n, size, seed)
    batches = [plan[step] for step in range(plan.n_batches)]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size


@given(n=st.integers(1, 60), size=st.integers(1, 9), steps=st.lists(st.integers(0, 300)))
def test_a_batch_depends_on_its_step_alone(n, size, steps):
    """Resumed at any step, in any order, a plan gives what an uninterrupted one gave."""
    plan = BatchPlan(n, size, seed=1)
    for step in steps:
        assert plan[step] == BatchPlan(n, size, seed=1)[step]


def test_epochs_and_seeds_are_shuffled_differently():
    plan = BatchPlan(100, 100, seed=0)
    orders = [plan[0], plan[1], plan[2], BatchPlan(100, 100, seed=1)[0]]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(100)]}) == 5


def test_the_order_is_the_same_in_every_version():
    assert BatchPlan(8, 3, seed=42)[0] == [7, 2, 5]
    assert BatchPlan(8, 3, seed=42)[5] == [0, 5]


@pytest.mark.parametrize(
    ("n", "size", "message"),
    [(0, 1, "n: expected at least 1, got 0"), (3, 0, "batch_size: expected at least 1, got 0")],
)
def test_an_empty_plan_is_refused(n, size, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(n, size, seed=0)


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="expected 0 or more, got -1"):
        BatchPlan(3, 1, seed=0)[-1]
