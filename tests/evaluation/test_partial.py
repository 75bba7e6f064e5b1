"""Partial replacement, compared with one model after another, and its number of block passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.partial_replacement import (
    FAMILIES,
    Family,
    PartialConfig,
    block_passes,
    measure_partial,
)
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.models.replacement import Mode


@torch.no_grad()
def logits(models: ModelSet, mode: Mode, replaced: list[bool], ids: list[int]) -> torch.Tensor:
    """Return the logits of the model's own forward, with the mode set for each layer."""
    model = models.model
    for mlp, is_replaced in zip(model.mlps, replaced, strict=True):
        mlp.mode = mode if is_replaced else "target"
    got: torch.Tensor = model(torch.tensor([ids])).logits[0, :-1]
    for mlp in model.mlps:
        mlp.mode = "replacement"
    return got


def configurations(n_layers: int) -> dict[Family, list[list[bool]]]:
    layers = range(n_layers)
    return {
        "first": [[layer < n for layer in layers] for n in range(n_layers + 1)],
        "last": [[layer >= n_layers - n for layer in layers] for n in range(n_layers + 1)],
        "single": [[layer == one for layer in layers] for one in layers],
    }


@pytest.mark.quick("gemma2")
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "olmo2"])
def test_equals_one_model_after_another(
    architecture: str, make_run: Callable[..., Path], texts: list[Text], tmp_path: Path
) -> None:
    kinds = {"a": "transcoder", "m": "mlp", "n": "norms"}
    runs = [
        make_run(name, seed, architecture, kind, "float64")
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    ]
    models = ModelSet.open(runs)
    config = PartialConfig(batch_tokens=18, chunk_tokens=5, streams_at_once=2)
    measured = measure_partial(models, texts, tmp_path / "out", config=config)
    assert list(measured) == ["hybrid", "a", "m", "n"]
    for name, got in measured.items():
        mode: Mode = "hybrid" if name == "hybrid" else "replacement"
        if mode == "replacement":
            models.replacement(name)
        for family, choices in configurations(3).items():
            kl, wrong = [], []
            for text in texts:
                p = logits(models, mode, [False] * 3, text.ids).log_softmax(-1)
                for replaced in choices:
                    q = logits(models, mode, replaced, text.ids).log_softmax(-1)
                    kl.append((p.exp() * (p - q)).sum())
                    wrong.append((p.argmax(-1) != q.argmax(-1)).sum())
            shape = (len(texts), len(choices))
            # transformers computes norms in float32, even in a float64 model.
            want = torch.stack(kl).view(shape)
            torch.testing.assert_close(got.kl[family], want, rtol=1e-6, atol=1e-6)
            assert torch.equal(got.wrong[family], torch.stack(wrong).view(shape))
        assert got.positions.tolist() == [len(text.ids) - 1 for text in texts]
        assert got.kl["first"][:, -1].min() > 0


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_block_passes_are_as_stated(
    at_once: int,
    make_run: Callable[..., Path],
    texts: list[Text],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = ModelSet.open([make_run("a", 1)])
    model, rows, largest = models.model, {"target": 0, "replacement": 0}, 0
    block = model.block

    def counted(layer: int, hidden: Any, arguments: Any, mode: Mode, **settings: Any) -> Any:
        nonlocal largest
        assert arguments["position_embeddings"][0].shape[0] in (1, len(hidden))
        rows[mode] += len(hidden)
        largest = max(largest, len(hidden))
        return block(layer, hidden, arguments, mode, **settings)

    monkeypatch.setattr(model, "block", counted)
    config = PartialConfig(batch_tokens=1000, streams_at_once=at_once)
    got = measure_partial(models, texts, tmp_path / str(at_once), names=["a"], config=config)
    n_layers, n = model.n_layers, len(texts)
    assert rows["replacement"] == n * n_layers * (n_layers + 1) // 2
    assert sum(rows.values()) == n * (n_layers + block_passes(n_layers))
    assert got["a"].block_passes == block_passes(n_layers) == n_layers**2 + 1
    # At the last layer, these streams use target blocks: the target, first 1..L-1, single 1..L-2.
    assert largest == n * min(at_once, 2 * n_layers - 2)


def test_about_half_of_one_by_one() -> None:
    """L layers have 3L - 3 distinct models, which one by one take L block passes each."""
    assert [block_passes(n) for n in (1, 2, 3, 4, 28)] == [1, 4, 10, 19, 1135]
    assert block_passes(28) / (28 * (3 * 28 - 3)) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_few_layers(
    n_layers: int, make_run: Callable[..., Path], texts: list[Text], tmp_path: Path
) -> None:
    """With one or two layers, families share most of their streams."""
    models = ModelSet.open([make_run("a", dtype="float64", n_layers=n_layers)])
    got = measure_partial(models, texts, tmp_path / "out", names=["hybrid"])["hybrid"]
    full = got.kl["first"][:, n_layers]
    assert torch.equal(full, got.kl["last"][:, n_layers])
    assert got.kl["first"].shape == got.kl["last"].shape == (5, n_layers + 1)
    assert got.kl["single"].shape == (5, n_layers)
    if n_layers == 1:
        assert torch.equal(got.kl["single"][:, 0], full)
    else:
        assert torch.equal(got.kl["single"][:, 0], got.kl["first"][:, 1])
        assert torch.equal(got.kl["single"][:, 1], got.kl["last"][:, 1])
        assert not torch.equal(got.kl["single"][:, 0], full)


def test_the_base_and_bad_settings_are_refused(
    make_run: Callable[..., Path], texts: list[Text], tmp_path: Path
) -> None:
    models = ModelSet.open([make_run("a", 1)])
    with pytest.raises(UserError, match="models with the target's attention, got the base"):
        measure_partial(models, texts, tmp_path, names=["base"])
    with pytest.raises(UserError, match=r"partial\.streams_at_once: expected at least 1, got 0"):
        PartialConfig(streams_at_once=0)
    assert FAMILIES == ("first", "last", "single")
