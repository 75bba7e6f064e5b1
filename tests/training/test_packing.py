"""Several texts in a row give the losses and gradients of the same texts apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.data.batches import collate, pack_rows, padded_width
from fastadapt.data.sequences import Sample
from fastadapt.errors import UserError
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.self_check import check_packing
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.config import TrainConfig
from fastadapt.training.run_dir import read_records
from fastadapt.training.trainer import train

#: Longer and shorter than the sliding windows of 4 and 5.
LENGTHS, ROWS = (9, 3, 6, 2, 7), ((0,), (1, 2), (3, 4))
ARCHITECTURES = ["llama", "qwen2", "gemma2"]
OTHERS = ["gemma3_text", "gemma4_text", "glm4", "mistral", "olmo2", "phi3", "qwen3"]


def texts() -> list[Sample]:
    """Return texts of which the second half, of the last one nothing, is counted."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i, n in enumerate(LENGTHS):
        ids = torch.randint(3, 20, (n,), generator=generator)
        labels = ids.clone()
        labels[: n if i == len(LENGTHS) - 1 else n // 2] = -100
        samples.append(Sample(i, ids, labels))
    return samples


def replacement(pair: Any) -> ReplacementModel:
    model = ReplacementModel.create(pair, AdapterConfig(24))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def losses_and_gradients(pair: Any, batch: Batch, cutoff: int) -> dict[str, torch.Tensor]:
    model = replacement(pair)
    out = objective(model, batch, cutoff, ObjectiveConfig())
    out.loss.backward()
    named = {name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None}
    fired = {f"fired {i}": call.stats.feature_counts for i, call in enumerate(out.calls)}
    return {**out.metrics, **named, **fired}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
@pytest.mark.usefixtures("float64_clean")
def test_a_packed_row_equals_its_texts_apart(
    architecture: str, make_pair: Callable[..., Any]
) -> None:
    packed, apart = collate(texts(), 2, rows=ROWS), collate(texts(), 2)
    assert packed.input_ids.shape == (3, 9)
    for cutoff in (1, 3):

        def measured(batch: Batch, cutoff: int = cutoff) -> dict[str, torch.Tensor]:
            return losses_and_gradients(make_pair(architecture, dtype="float64"), batch, cutoff)

        expected = measured(apart)
        assert len(expected) > 12
        assert largest_difference(measured(packed), expected) < 1e-10
        # The same rows read as one text each are another loss.
        assert abs(measured(packed._replace(packing=None))["loss"] - expected["loss"]) > 1e-6


def test_texts_that_influence_each_other_are_refused(make_pair: Callable[..., Any]) -> None:
    """Linear attention carries its state from one text of a row to the next."""
    packed, apart = collate(texts(), 2, rows=ROWS), collate(texts(), 2)
    check_packing(replacement(make_pair("gemma2")), packed, apart)
    with pytest.raises(UserError, match=r"data\.pack: texts that share a row have other logits"):
        check_packing(replacement(make_pair("qwen3_5_text")), packed, apart)


def test_a_packed_run_trains_as_an_unpacked_one(
    tiny_config: Callable[..., TrainConfig], tmp_path: Any
) -> None:
    runs = {}
    for name, pack in (("apart", None), ("packed", 48)):
        changes = {"data.pack": pack, "optimizer.batch_size": 6, "run.log_every": 1}
        result = train(tiny_config(**{**changes, "run.output": str(tmp_path / name)}))
        assert result["tokens"] == train_tokens(tmp_path / name)
        records = read_records(tmp_path / name / "metrics.jsonl")
        runs[name] = [r for r in records if r["kind"] in ("train", "eval")]
    assert len(runs["apart"]) == len(runs["packed"]) > 4
    for apart, packed in zip(runs["apart"], runs["packed"], strict=True):
        assert apart.keys() == packed.keys()
        for key in ("loss", "kl", "nmse", "nmse_token", "l0", "grad_norm", "kl_adapter"):
            if key in apart:
                assert packed[key] == pytest.approx(apart[key], rel=1e-4), key
        assert packed.get("tokens") == apart.get("tokens")


def train_tokens(folder: Any) -> int:
    """Return the tokens of the training set, all of which a run of one epoch counts."""
    (start,) = (r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "start")
    return int(start["epoch_tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.pack": 64, "optimizer.batch_size": 1}, r"expected optimizer\.batch_size above 1"),
        (
            {"data.pack": 64, "adapter.activation": "batch_topk", "adapter.k": 2.5},
            "expected null with adapter.activation batch_topk",
        ),
        ({"data.pack": 3}, r"data\.pack: expected at least 4 or null, got 3"),
    ],
)
def test_settings_that_exclude_packing(
    changes: dict[str, Any], message: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=20),
    limit=st.integers(4, 1000),
    multiple=st.sampled_from([1, 8, 128]),
)
def test_rows_hold_every_text_once_in_no_more_tokens(
    lengths: list[int], limit: int, multiple: int
) -> None:
    rows = pack_rows(lengths, limit, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    width = padded_width(max(sum(lengths[i] for i in row) for row in rows), multiple)
    assert width <= max(limit, padded_width(max(lengths), multiple))
    assert len(rows) * width <= len(lengths) * padded_width(max(lengths), multiple)


def test_rows_are_as_few_as_they_save_tokens() -> None:
    """A long text lets short ones share a row of its length, also beyond the limit."""
    assert pack_rows([90, 30, 30, 30], limit=4) == [[0], [1, 2, 3]]
    assert pack_rows([30] * 4, limit=60, multiple=32) == [
        [0],
        [1],
        [2],
        [3],
    ]  # 128 tokens either way
    assert pack_rows([30] * 4, limit=128, multiple=128) == [[0, 1, 2, 3]]
    assert pack_rows([30] * 4, limit=127, multiple=128) == [[0, 1, 2, 3]]  # a text has 128 as well
