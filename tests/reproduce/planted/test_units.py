"""Units of every method, on a target with one known difference: its weights say where and what."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.adapter.module import AdapterConfig
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.organism import NAMES
from reproduce.planted.differences import Planted
from reproduce.planted.judge import CONTEXTS, Judge, Unit
from reproduce.planted.measure import after_blocks, elsewhere, in_place
from reproduce.planted.organisms import tokenizer
from reproduce.planted.reading import Probes, read, read_features
from reproduce.planted.units import (
    by_contribution,
    by_frequency,
    by_kl,
    by_states,
    by_weights,
    distinct,
)

OPENING, SEED, LAYERS = 2, 0, 4
VOCABULARY = tokenizer().get_vocab()
TEXTS = list(islice(Planted.draw(SEED).texts("units"), 60))
PROBES = Probes.locate(TEXTS, VOCABULARY, 8)


def replacement(n_features: int) -> ReplacementModel:
    """Return the base with new adapters, which add nothing."""
    pair = ModelPair.load(PairConfig("organism/base", "organism/base", device="cpu"))
    return ReplacementModel.create(pair, AdapterConfig(n_features=n_features), seed=0)


def read_all(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Return predictions, what enters the output matrices, the states, and the MLPs' inputs."""
    mlps = [layer.mlp for layer in model.model.layers]
    outputs = [mlp.down_proj for mlp in mlps]
    return read(model, PROBES, [*outputs, *after_blocks(model), *mlps])


@pytest.fixture(scope="module")
def pair() -> Any:
    """Return the base; a copy that writes the opening after `solution :`, in the last MLP; and
    adapters of the base that do the same by one feature.
    """
    planted = Planted.draw(SEED)
    base = _load()
    before = read_all(base)
    target = copy.deepcopy(base)
    places = PROBES.planted[OPENING]
    head = target.lm_head.weight.detach() * target.model.norm.weight.detach()
    word = _apart(head, head[VOCABULARY[planted.opening]])
    write = 10 * before[1][2 * LAYERS - 1][places].norm(dim=1).mean() * word / word.norm()
    adapted = replacement(4)
    with torch.no_grad():
        target.model.layers[-1].mlp.down_proj.weight += torch.outer(
            write, _key(before[1][LAYERS - 1], places)
        )
        adapters: list[Any] = list(adapted.adapters)
        for adapter in adapters:
            adapter.W_enc.zero_()
        last = adapters[-1]
        last.W_enc[1] = _key(before[1][-1], places)
        last.b_enc[1] = -0.1  # the key reads about 1 at the places, and about 0 elsewhere
        last.W_dec[1] = 4 * write
    outputs = [frozenset(VOCABULARY[w] for w in d.outputs) for d in planted.differences]
    return SimpleNamespace(
        models=(base, target, adapted),
        readings=(before, read_all(target)),
        judge=Judge(PROBES.planted, outputs, len(VOCABULARY)),
        word=VOCABULARY[planted.opening],
        words=sorted(VOCABULARY, key=VOCABULARY.__getitem__),
    )


def _load() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        NAMES["organism/base"], trust_remote_code=False, dtype=torch.float32
    ).eval()


def _key(entering: Tensor, places: Tensor) -> Tensor:
    """Return the direction that reads 1 at the places on average, and little elsewhere."""
    here = entering[places].mean(0)
    key = _apart(entering[~places], here)
    return key / (here @ key)


def _apart(rows: Tensor, row: Tensor) -> Tensor:
    """Return the direction with a given product with a row and the least with other rows."""
    spread = rows.T @ rows / len(rows) + 1e-3 * torch.eye(rows.shape[1])
    return torch.linalg.solve(spread, row)


def _weights(models: Any, readings: Any) -> list[Unit]:
    matrices = [
        [layer.mlp.down_proj.weight for layer in model.model.layers] for model in models[:2]
    ]
    changes = [(theirs - ours).detach() for ours, theirs in zip(*matrices, strict=True)]
    return by_weights(changes, readings[1][1][:LAYERS], models[1].lm_head.weight)


def _states(models: Any, readings: Any) -> list[Unit]:
    before, after = (reading[1][LAYERS : 2 * LAYERS] for reading in readings)
    return by_states((before, after), models[1].lm_head.weight)


def _features(models: Any, _: Any) -> list[Unit]:
    adapters: Any = models[2].adapters
    rows = [adapter.W_dec.detach() for adapter in adapters]
    return by_contribution(read_features(models[2], PROBES), rows, models[2].head)


METHODS: dict[str, Callable[[Any, Any, Any], list[Unit]]] = {
    "tokens": lambda p, _, r: by_frequency((r[0][0], r[1][0]), p.words),
    "kl": lambda p, _, r: by_kl((r[0][0], r[1][0]), p.words),
    "weights": lambda _, models, r: _weights(models, r),
    "states": lambda _, models, r: _states(models, r),
    "adapter": lambda _, models, r: _features(models, r),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_first_unit_describes_the_only_difference(pair: Any, method: str) -> None:
    before, after = (r[0][PROBES.planted[OPENING]].argmax(-1) == pair.word for r in pair.readings)
    assert after.double().mean() > 0.9
    assert not before.any()
    units = METHODS[method](pair, pair.models, pair.readings)
    assert pair.judge.describes(units[0]) == [OPENING]


def test_the_adapter_of_the_test_does_what_the_target_does(pair: Any) -> None:
    log_p, _ = read(pair.models[2].model, PROBES)
    assert (log_p[PROBES.planted[OPENING]].argmax(-1) == pair.word).double().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_have_no_units(pair: Any, method: str) -> None:
    base, reading = pair.models[0], pair.readings[0]
    assert METHODS[method](pair, (base, base, replacement(4)), (reading, reading)) == []


def test_features_are_ranked_as_fastadapt_features_ranks_them() -> None:
    """By mean activation × norm of the decoder row; here from the codes of each text alone."""
    model = replacement(16)
    decoders: list[Any] = [adapter.W_dec for adapter in model.adapters]
    with torch.no_grad():
        for i, decoder in enumerate(decoders):
            decoder.copy_(torch.randn(16, 128, generator=torch.Generator().manual_seed(i)))
            decoder[3] = 0  # fires, and writes nothing
    units = by_contribution(
        read_features(model, PROBES), [decoder.detach() for decoder in decoders], model.head
    )
    fired: dict[str, list[tuple[float, int]]] = defaultdict(list)
    n = 0
    for row, positions in zip(PROBES.rows, PROBES.read, strict=True):
        index = {t: n + i for i, t in enumerate(positions)}
        n += len(positions)
        for layer, codes in enumerate(model.features(row)):
            for t, feature, value in zip(*(each.tolist() for each in codes), strict=True):
                if t in index:
                    fired[f"{layer}/{feature}"].append((value, index[t]))
    sizes = {}
    for name, values in fired.items():
        layer, feature = map(int, name.split("/"))
        norm = decoders[layer][feature].norm().item()
        sizes[name] = sum(value for value, _ in values) / n * norm
    expected = sorted((name for name in sizes if sizes[name] > 0), key=lambda name: -sizes[name])
    assert [unit.name for unit in units] == expected
    assert not any(unit.name.endswith("/3") for unit in units)
    strongest = {name: max(values)[1] for name, values in fired.items()}
    for unit in units:
        places = {position for _, position in fired[unit.name]}
        assert unit.contexts[0] == strongest[unit.name]
        assert len(unit.contexts) == min(CONTEXTS, len(places))
        assert places.issuperset(unit.contexts)


# --- tokens and KL ---


def predictions(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).log()


UNIFORM = [0.25, 0.25, 0.25, 0.25]
BEFORE = predictions([UNIFORM] * 6)
AFTER = predictions(
    [
        UNIFORM,
        [0.40, 0.30, 0.20, 0.10],
        [0.70, 0.10, 0.10, 0.10],
        [0.08, 0.88, 0.03, 0.01],
        [0.31, 0.29, 0.10, 0.30],
        [0.85, 0.05, 0.05, 0.05],
    ]
)


def test_the_contexts_of_a_token_are_where_it_rises_most() -> None:
    assert by_frequency((BEFORE, AFTER), "abcd") == [
        Unit("a", [5, 2, 1, 4], [0]),  # and falls at 3
        Unit("b", [3, 1, 4], [1]),
    ]


def test_kl_is_grouped_by_the_token_of_its_largest_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reproduce.planted.units.PROMOTED", 2)
    assert by_kl((BEFORE, AFTER), "abcd") == [
        Unit("b", [3], [1, 3]),  # the term of 2 is further below 0
        Unit("a", [5, 2, 1, 4], [0, 1]),  # 1 by the mean: at 5 the others are equal
    ]


def test_a_reader_skips_what_an_earlier_unit_has_shown() -> None:
    units = [Unit(str(i), contexts, [0]) for i, contexts in enumerate([
        [0, 1, 2, 3],
        [3, 4, 5, 6],  # shares one of four
        [2, 3, 7, 8],  # shares half with the first
        [4, 5, 9, 10],  # shares half with the second
        [7, 8, 9, 10],  # shares half with two that nobody has read
        [0, 11, 12],
    ])]  # fmt: skip
    assert [unit.name for unit in distinct(units, 9)] == ["0", "1", "4", "5"]
    assert [unit.name for unit in distinct(units, 2)] == ["0", "1"]


# --- positions ---


def test_positions_are_those_before_words_that_a_model_writes() -> None:
    n = 0
    for text, row, positions in zip(TEXTS, PROBES.rows, PROBES.read, strict=True):
        assert positions == [
            t for t in range(len(row) - 1) if t + 1 >= text.start and t not in text.unread
        ]
        here = slice(n, n + len(positions))
        assert PROBES.token[here].tolist() == [row[t] for t in positions]
        assert PROBES.following[here].tolist() == [row[t + 1] for t in positions]
        marks = [(number, t) for t, number in text.planted.items()]
        assert [(k, positions[t]) for t, k in PROBES.planted[:, here].T.nonzero().tolist()] == [
            (k, t) for k, t in sorted(marks, key=lambda mark: mark[1])
        ]
        n += len(positions)
    assert n == len(PROBES.token)
    assert any(text.unread for text in TEXTS)


def test_readings_are_those_of_the_models_forward(pair: Any) -> None:
    n, positions = len(PROBES.read[0]), PROBES.read[0]
    with torch.no_grad():
        ids = torch.tensor([PROBES.rows[0]])
        out = pair.models[1](ids, output_hidden_states=True)
    log_p, entering = pair.readings[1]
    expected = out.logits[0, positions].log_softmax(-1)
    torch.testing.assert_close(log_p[:n], expected, atol=1e-4, rtol=0)
    states = entering[LAYERS : 2 * LAYERS]
    for ours, theirs in zip(states[:-1], out.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(ours[:n], theirs[0, positions], atol=1e-4, rtol=1e-4)
    last = pair.models[1].model.norm(states[-1][:n])
    torch.testing.assert_close(last, out.hidden_states[-1][0, positions], atol=1e-4, rtol=1e-4)


def test_probabilities_in_place_and_elsewhere() -> None:
    """Words 2 (twice) and 3 are planted after token 7; a second difference has no place."""
    token = torch.tensor([7, 7, 7, 7, 7, 9])
    following = torch.tensor([2, 2, 3, 2, 4, 2])
    planted = torch.zeros(2, 6, dtype=torch.bool)
    planted[0, :3] = True
    p = torch.full((6, 10), 0.01)
    p[0, 2], p[1, 2], p[2, 3] = 0.9, 0.8, 0.7
    p[3, 2], p[3, 3] = 0.99, 0.2  # the text has word 2 there: only word 3 does not belong
    p[4, 2], p[4, 3] = 0.4, 0.6
    p[5, 2] = 0.99  # after another token
    probes = Probes([], [], token, following, planted)
    assert in_place(p.log(), probes) == [pytest.approx(0.8), None]
    assert elsewhere(p.log(), probes) == [
        pytest.approx((2 * 0.4 + (0.2 + 0.6) / 2) / 3),
        None,
    ]
    nowhere = Probes([], [], token, torch.full((6,), 2), planted)
    assert elsewhere(p.log(), nowhere) == [None, None]
