"""Measures of outputs, compared with the models' own forwards, and resumption after a stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness.outputs import OutputConfig, measure_output
from fastadapt.evaluation.faithfulness.texts import Text, batch_of
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.models.replacement import Mode
from fastadapt.training.held_out import evaluate

SMALL = OutputConfig(batch_tokens=18, chunk_tokens=5, students_at_once=3)


def open_all(
    make_run: Callable[..., Path], architecture: str = "qwen2", dtype: str = "float64"
) -> ModelSet:
    kinds = {"a": "transcoder", "b": "transcoder", "m": "mlp", "n": "norms"}
    runs = [
        make_run(name, seed, architecture, kind, dtype)
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    ]
    return ModelSet.open(runs)


@torch.no_grad()
def plain(models: ModelSet, name: str, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ``[T-1, V]`` and hidden states ``[L+1, T, D]`` of one text."""
    with models.generating(name) as model:
        # transformers' last hidden state is after the final norm; the hook records it before.
        last: list[torch.Tensor] = []
        hook = model.model.layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out))
        got = model(torch.tensor([ids]), output_hidden_states=True)
        hook.remove()
    hidden = [*got.hidden_states[:-1], last[0]]
    return got.logits[0, :-1], torch.stack(hidden)[:, 0]


@pytest.mark.parametrize("architecture", [pytest.param("qwen2", marks=pytest.mark.slow), "gemma2"])
def test_measures_equal_plain_forwards(
    architecture: str, make_run: Callable[..., Path], texts: list[Text], tmp_path: Path
) -> None:
    models = open_all(make_run, architecture)
    measured = measure_output(models, texts, tmp_path / "out", config=SMALL)
    assert list(measured) == ["base", "hybrid", "a", "b", "m", "n"]
    arrays: Any
    for name, arrays in measured.items():
        active = 0
        for i, text in enumerate(texts):
            clean, h = plain(models, "target", text.ids)
            logits, h_hat = plain(models, name, text.ids)
            p, q = clean.log_softmax(-1), logits.log_softmax(-1)
            rows = arrays.text == i
            kl = (p.exp() * (p - q)).sum(-1)
            torch.testing.assert_close(arrays.kl[rows], kl.float(), rtol=1e-5, atol=1e-6)
            assert torch.equal(arrays.agrees[rows], clean.argmax(-1) == logits.argmax(-1))
            assert arrays.position[rows].tolist() == list(range(len(text.ids) - 1))
            if name == "base":
                continue
            error, power = (h_hat - h).square(), h.square()
            for column, start in enumerate((0, 1)):
                e, w = error[:, start:], power[:, start:]
                ratio = e.sum((1, 2)) / w.sum((1, 2))
                token_ratio = (e.sum(2) / w.sum(2)).mean(1)
                close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(arrays.nmse[i, column], ratio.float(), **close)
                torch.testing.assert_close(
                    arrays.token_nmse[i, column], token_ratio.float(), **close
                )
            if name in ("a", "b"):
                active += count_active(models, name, text.ids)
        assert (arrays.nmse is None) == (name == "base")
        tokens = sum(len(text.ids) for text in texts)
        assert arrays.l0 == (active / (3 * tokens) if name in ("a", "b") else None)
    assert 0 < measured["a"].kl.mean() != measured["b"].kl.mean()


def count_active(models: ModelSet, name: str, ids: list[int]) -> int:
    """Return the number of active features over all tokens and layers."""
    model, count = models.replacement(name), 0

    def add(mlp: Any, inputs: Any) -> None:
        nonlocal count
        adapter = mlp.adapter
        count += int((inputs[0] @ adapter.W_enc.T + adapter.b_enc > 0).sum())

    hooks = [mlp.register_forward_pre_hook(add) for mlp in model.mlps]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return count


def test_the_same_measures_as_in_training(
    make_run: Callable[..., Path], texts: list[Text], tmp_path: Path
) -> None:
    """For texts of one length, a mean over texts equals a mean over positions."""
    models = ModelSet.open([make_run("a", 1, dtype="float64")])
    same = [text._replace(ids=text.ids[:4]) for text in texts]
    arrays: Any = measure_output(models, same, tmp_path)
    held_out = evaluate(models.replacement("a"), [batch_of(same, range(len(same)))])
    for name, suffix in (("hybrid", "hybrid"), ("a", "adapter")):
        got = arrays[name]
        assert got.kl.mean().item() == pytest.approx(held_out[f"kl_{suffix}"], rel=1e-5)
        wrong = 1 - got.agrees.double().mean().item()
        assert wrong == pytest.approx(held_out[f"top1_error_{suffix}"])
    assert arrays["a"].nmse[:, 0].mean(0).tolist() == pytest.approx(
        held_out["nmse_per_layer"], rel=1e-5
    )
    assert arrays["a"].l0 == pytest.approx(held_out["l0_mean"])


def record_modes(models: ModelSet, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every block pass of the pair appends its mode."""
    modes: list[str] = []
    block = models.model.block

    def recorded(layer: int, hidden: Any, arguments: Any, mode: Mode, **settings: Any) -> Any:
        modes.append(mode)
        return block(layer, hidden, arguments, mode, **settings)

    monkeypatch.setattr(models.model, "block", recorded)
    return modes


def test_models_share_one_pass_of_the_target(
    make_run: Callable[..., Path],
    texts: list[Text],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = ModelSet.open([make_run("a", 1), make_run("b", 2)])
    modes = record_modes(models, monkeypatch)
    measure_output(models, texts, tmp_path, names=["hybrid", "a", "b"])
    assert [modes.count(mode) for mode in ("target", "hybrid", "replacement")] == [3, 3, 6]


def test_finished_work_is_not_repeated(
    make_run: Callable[..., Path],
    texts: list[Text],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = ModelSet.open([make_run("a", 1), make_run("b", 2)])
    calls: list[tuple[int, int]] = []
    stop = Event()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        stop.set()

    settings: dict[str, Any] = {"config": SMALL, "names": ["hybrid", "a"], "progress": progress}
    assert measure_output(models, texts, tmp_path, **settings, stop=stop) == {}
    assert calls == [(2, 6)]
    whole = measure_output(models, texts, tmp_path, **settings)
    assert calls[1:] == [(4, 6), (6, 6)]
    modes = record_modes(models, monkeypatch)
    again = measure_output(models, texts, tmp_path, config=SMALL, names=["a", "b"])
    one_model = {"target": 3 * 3, "replacement": 3 * 3}  # batches times layers
    assert Counter(modes) == one_model
    assert torch.equal(again["a"].kl, whole["a"].kl)
    fresh = measure_output(models, texts, tmp_path / "fresh", config=SMALL, names=["b"])
    assert torch.equal(fresh["b"].kl, again["b"].kl)
    changed = [*texts[:-1], texts[-1]._replace(ids=[*texts[-1].ids, 3])]
    modes.clear()
    measure_output(models, changed, tmp_path, config=SMALL, names=["a"])
    assert Counter(modes) == one_model


def test_unknown_models_bad_settings_and_nan_are_refused(
    make_run: Callable[..., Path], texts: list[Text], tmp_path: Path
) -> None:
    models = ModelSet.open([make_run("a", 1)])
    with pytest.raises(UserError, match="model 'c': expected one of base, hybrid, a"):
        measure_output(models, texts, tmp_path, names=["c"])
    with pytest.raises(UserError, match=r"outputs\.batch_tokens: expected at least 1, got 0"):
        OutputConfig(batch_tokens=0)
    with torch.no_grad():
        adapters: Any = models.adapters("a")
        adapters[2].W_dec[:] = torch.nan
    with pytest.raises(RunError, match="a: a prediction on texts t1, t3, t0, t4, t2 is not"):
        measure_output(models, texts, tmp_path, names=["a"])
