"""Units of the baselines, on a target with one known difference: its weights say where and what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastadapt.organism import NAMES
from reproduce.planted.differences import Planted
from reproduce.planted.judge import Judge, Unit
from reproduce.planted.measure import _load
from reproduce.planted.organisms import tokenizer
from reproduce.planted.reading import locate, read
from reproduce.planted.units import by_frequency, by_kl, by_states, by_weights

OPENING, SEED, N = 2, 0, 40


@pytest.fixture(scope="module")
def pair() -> Any:
    """Return the base, and a copy that writes the opening after `solution :`, in the last MLP."""
    vocabulary, planted = tokenizer().get_vocab(), Planted.draw(SEED)
    probes = list(islice(planted.texts("units"), 60))
    positions = locate(probes, vocabulary, 8)
    base = _load(NAMES["organism/base"])
    before = read(base, probes, vocabulary)
    target = copy.deepcopy(base)
    places = positions.planted[OPENING]
    entering = before.inputs[-1]
    here, elsewhere = entering[places].mean(0), entering[~places]
    # The directions that are large at the places and for the word, and small elsewhere.
    key = _apart(elsewhere, here)
    head = target.lm_head.weight.detach() * target.model.norm.weight.detach()
    word = _apart(head, head[vocabulary[planted.opening]])
    with torch.no_grad():
        change = torch.outer(word / word.norm(), key / (here @ key))
        size = 10 * before.states[-1][places].norm(dim=1).mean()
        target.model.layers[-1].mlp.down_proj.weight += size * change
    after = read(target, probes, vocabulary)
    outputs = [frozenset(vocabulary[w] for w in d.outputs) for d in planted.differences]
    judge = Judge(positions.planted, outputs, len(vocabulary))
    return SimpleNamespace(
        models=(base, target),
        readings=(before, after),
        positions=positions,
        judge=judge,
        word=vocabulary[planted.opening],
        words=sorted(vocabulary, key=vocabulary.__getitem__),
    )


def _apart(rows: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return the direction with a given product with a row and the least with other rows."""
    spread = rows.T @ rows / len(rows) + 1e-3 * torch.eye(rows.shape[1])
    return torch.linalg.solve(spread, row)


METHODS: dict[str, Callable[[Any, Any, Any], list[Unit]]] = {
    "tokens": lambda p, _, r: by_frequency(r[0], r[1], p.positions, p.words, N, SEED),
    "kl": lambda p, _, r: by_kl(r[0], r[1], p.positions, p.words, N),
    "weights": lambda _, models, r: by_weights(models[0], models[1], r[1], N),
    "states": lambda _, models, r: by_states(r[0], r[1], models[1].lm_head.weight, N),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_first_unit_describes_the_only_difference(pair: Any, method: str) -> None:
    places = pair.positions.planted[OPENING]
    before, after = (r.log_p[places].argmax(-1) == pair.word for r in pair.readings)
    assert after.double().mean() > 0.9
    assert not before.any()
    units = METHODS[method](pair, pair.models, pair.readings)
    assert pair.judge.describes(units[0]) == [OPENING]
    assert 0 < len(units) <= N


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_described_in_equal_models(pair: Any, method: str) -> None:
    base, reading = pair.models[0], pair.readings[0]
    units = METHODS[method](pair, (base, base), (reading, reading))
    assert not any(map(pair.judge.describes, units))


def test_readings_are_those_of_the_models_forward(pair: Any) -> None:
    ids = pair.positions.token[: pair.positions.first[1]]
    with torch.no_grad():
        out = pair.models[1](ids[None], output_hidden_states=True)
    reading = pair.readings[1]
    n = len(ids)
    torch.testing.assert_close(reading.log_p[:n], out.logits[0].log_softmax(-1), atol=1e-4, rtol=0)
    for ours, theirs in zip(reading.states[:-1], out.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(ours[:n], theirs[0], atol=1e-4, rtol=1e-4)
    assert pair.positions.following[: n - 1].tolist() == ids[1:].tolist()
    assert pair.positions.following[n - 1] == -1
    assert not pair.positions.written[n - 1]
