"""Predictions of every kind of student against plain forwards, and what a stop leaves behind."""

from __future__ import annotations

from threading import Event

import pytest
import torch

from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness import outputs as output
from fastadapt.evaluation.faithfulness.outputs import OutputConfig, measure_output
from fastadapt.evaluation.faithfulness.texts import batch_of
from fastadapt.evaluation.models_under_test import Students
from fastadapt.training.held_out import evaluate

SMALL = OutputConfig(batch_tokens=18, chunk_tokens=5, students_at_once=3)


def open_all(make_run, architecture: str = "qwen2", dtype: str = "float64") -> Students:
    kinds = {"a": "transcoder", "b": "transcoder", "m": "mlp", "n": "norms"}
    runs = [
        make_run(name, seed, architecture, kind, dtype)
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    ]
    return Students.open(runs)


@torch.no_grad()
def plain(students: Students, name: str, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[T-1, V]`` and hidden states ``[L+1, T, D]`` of one text, by the model's forward."""
    with students.generating(name) as model:
        # The last of these is after the final norm; it is caught before it.
        last: list[torch.Tensor] = []
        hook = model.model.layers[-1].register_forward_hook(lambda _m, _i, out: last.append(out))
        got = model(torch.tensor([ids]), output_hidden_states=True)
        hook.remove()
    hidden = [*got.hidden_states[:-1], last[0]]
    return got.logits[0, :-1], torch.stack(hidden)[:, 0]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_measures_equal_plain_forwards(architecture, make_run, texts, tmp_path) -> None:
    students = open_all(make_run, architecture)
    measured = measure_output(students, texts, tmp_path / "out", config=SMALL)
    assert list(measured) == ["base", "hybrid", "a", "b", "m", "n"]
    for name, arrays in measured.items():
        active = 0
        for i, text in enumerate(texts):
            clean, h = plain(students, "target", text.ids)
            logits, h_hat = plain(students, name, text.ids)
            p, q = clean.log_softmax(-1), logits.log_softmax(-1)
            here = arrays.text == i
            kl = (p.exp() * (p - q)).sum(-1)
            torch.testing.assert_close(arrays.kl[here], kl.float(), rtol=1e-5, atol=1e-6)
            assert torch.equal(arrays.agrees[here], clean.argmax(-1) == logits.argmax(-1))
            assert arrays.position[here].tolist() == list(range(len(text.ids) - 1))
            if name == "base":
                continue
            error, power = (h_hat - h).square(), h.square()
            for column, start in enumerate((0, 1)):
                e, w = error[:, start:], power[:, start:]
                ratio = e.sum((1, 2)) / w.sum((1, 2))
                of_token = (e.sum(2) / w.sum(2)).mean(1)
                close = {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(arrays.nmse[i, column], ratio.float(), **close)
                torch.testing.assert_close(arrays.token_nmse[i, column], of_token.float(), **close)
            if name in ("a", "b"):
                active += fired(students, name, text.ids)
        assert (arrays.nmse is None) == (name == "base")
        tokens = sum(len(text.ids) for text in texts)
        assert arrays.l0 == (active / (3 * tokens) if name in ("a", "b") else None)
    assert 0 < measured["a"].kl.mean() != measured["b"].kl.mean()


def fired(students: Students, name: str, ids: list[int]) -> int:
    """Active features over all tokens and layers."""
    model, count = students.replacement(name), 0

    def add(mlp, inputs) -> None:
        nonlocal count
        adapter = mlp.adapter
        count += int((inputs[0] @ adapter.W_enc.T + adapter.b_enc > 0).sum())

    hooks = [mlp.register_forward_pre_hook(add) for mlp in model.mlps]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return count


def test_the_same_measures_as_in_training(make_run, texts, tmp_path) -> None:
    """On texts of one length, where a mean over texts is one over positions."""
    students = Students.open([make_run("a", 1, dtype="float64")])
    same = [text._replace(ids=text.ids[:4]) for text in texts]
    arrays = measure_output(students, same, tmp_path)
    held_out = evaluate(students.replacement("a"), [batch_of(same, range(len(same)))])
    for name, told in (("hybrid", "hybrid"), ("a", "adapter")):
        got = arrays[name]
        assert got.kl.mean().item() == pytest.approx(held_out[f"kl_{told}"], rel=1e-5)
        wrong = 1 - got.agrees.double().mean().item()
        assert wrong == pytest.approx(held_out[f"top1_error_{told}"])
    assert arrays["a"].nmse[:, 0].mean(0).tolist() == pytest.approx(
        held_out["nmse_per_layer"], rel=1e-5
    )
    assert arrays["a"].l0 == pytest.approx(held_out["l0_mean"])


def test_one_pass_of_the_target_serves_all_students(make_run, texts, tmp_path, monkeypatch) -> None:
    students = Students.open([make_run("a", 1), make_run("b", 2)])
    modes: list[str] = []
    block = students.model.block

    def counted(layer, hidden, arguments, mode, **settings):
        modes.append(mode)
        return block(layer, hidden, arguments, mode, **settings)

    monkeypatch.setattr(students.model, "block", counted)
    measure_output(students, texts, tmp_path, names=["hybrid", "a", "b"])
    assert [modes.count(mode) for mode in ("target", "hybrid", "replacement")] == [3, 3, 6]


def test_finished_work_is_not_repeated(make_run, texts, tmp_path, monkeypatch) -> None:
    students = Students.open([make_run("a", 1), make_run("b", 2)])
    told: list[tuple[int, int]] = []
    stop = Event()

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        stop.set()

    settings = {"config": SMALL, "names": ["hybrid", "a"], "progress": progress}
    assert measure_output(students, texts, tmp_path, **settings, stop=stop) == {}
    assert told == [(2, 6)]
    whole = measure_output(students, texts, tmp_path, **settings)
    assert told[1:] == [(4, 6), (6, 6)]
    calls: list[list[str]] = []
    measure = output._measure

    def counted(students, batch, names, *rest):
        calls.append(list(names))
        return measure(students, batch, names, *rest)

    monkeypatch.setattr(output, "_measure", counted)
    again = measure_output(students, texts, tmp_path, config=SMALL, names=["a", "b"])
    assert calls == [["b"]] * 3
    assert torch.equal(again["a"].kl, whole["a"].kl)
    fresh = measure_output(students, texts, tmp_path / "fresh", config=SMALL, names=["b"])
    assert torch.equal(fresh["b"].kl, again["b"].kl)
    changed = [*texts[:-1], texts[-1]._replace(ids=[*texts[-1].ids, 3])]
    calls.clear()
    measure_output(students, changed, tmp_path, config=SMALL, names=["a"])
    assert calls == [["a"]] * 3


def test_bad_students(make_run, texts, tmp_path) -> None:
    students = Students.open([make_run("a", 1)])
    with pytest.raises(UserError, match="no student is called 'c'; there are base, hybrid, a"):
        measure_output(students, texts, tmp_path, names=["c"])
    with pytest.raises(UserError, match=r"outputs\.batch_tokens: expected at least 1, got 0"):
        OutputConfig(batch_tokens=0)
    with torch.no_grad():
        students.adapters("a")[2].W_dec[:] = torch.nan
    with pytest.raises(RunError, match="a: a prediction on texts t1, t3, t0, t4, t2 is not"):
        measure_output(students, texts, tmp_path, names=["a"])
