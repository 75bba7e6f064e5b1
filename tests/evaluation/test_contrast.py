"""Contrasts at places: entropy matching, places of words, planted effects, intervals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.matching import Candidates, match
from fastadapt.evaluation.contrast.measure import Reader, entropy_of, log_odds_of, read
from fastadapt.evaluation.contrast.places import (
    Place,
    Rows,
    matched_places,
    rows_of,
    sites_of,
    slip_places,
    word_sites,
)
from fastadapt.evaluation.contrast.summary import ALL, Contrast, kinds_of, summarise
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.statistics import BootstrapConfig

FAST = BootstrapConfig(resamples=500)
MARKED, PLAIN, WORD = 5, 6, 7  # tokens


def reader_of(name: str, model: Any) -> Reader:
    return Reader(name, f"{name}-0", lambda: nullcontext(model))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_values_equal_plain_softmax(
    architecture: str,
    make_pair: Callable[..., Any],
    texts: list[Text],
    tmp_path: Path,
    float64_clean: None,
) -> None:
    """gemma2 caps its logits. Batches are of several texts, plain forwards of one."""
    model = make_pair(architecture, "float64").target
    sites = [(0, 0), (0, 4), (1, 9), (1, 10), (3, 2), (4, 5)]
    sets = [[3, 8, 21], [3], [39]]
    reader = reader_of("m", model)
    entropy = entropy_of("model")
    for quantity in (log_odds_of(sets, "model"), entropy):
        values = read(reader, texts, sites, quantity, tmp_path, batch_tokens=20)
        assert values is not None
        for (t, position), row in zip(sites, values, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([texts[t].ids])).logits[0, position]
            p = [math.exp(x) for x in logits.tolist()]
            p = [x / math.fsum(p) for x in p]
            if quantity is entropy:
                expected = [-math.fsum(x * math.log(x) for x in p)]
                got = row.tolist()
            else:
                expected = [math.fsum(p[i] for i in ids) for ids in sets]
                got = row.sigmoid().tolist()
            assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-12


def test_a_stopped_reading_is_resumed(
    make_pair: Callable[..., Any], texts: list[Text], tmp_path: Path
) -> None:
    """Batches that were read are not read again, and other models or places are others' files."""
    model, stop, calls = make_pair("qwen2").target, Event(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    sites = [(0, 1), (1, 3), (2, 2), (3, 5)]

    def reading(name: str = "m", places: Any = sites, **settings: Any) -> Tensor | None:
        return read(
            reader_of(name, model),
            texts,
            places,
            log_odds_of([[3]], "model"),
            tmp_path,
            batch_tokens=12,
            **settings,
        )

    assert reading(progress=lambda *_: stop.set(), stop=stop) is None
    assert len(calls) == 1
    resumed = reading()
    whole = len(calls)
    assert resumed is not None
    assert torch.equal(resumed, reading())  # type: ignore[arg-type]
    assert len(calls) == whole
    other = reading("other")
    assert torch.equal(resumed, other)  # type: ignore[arg-type]
    assert len(calls) == 2 * whole
    fewer = reading(places=sites[1:])
    assert torch.allclose(resumed[1:], fewer)  # type: ignore[arg-type]


# --- a planted effect -----------------------------------------------------------------------------


def planted(model: Any, strength: float) -> Any:
    """Return a copy that raises ``WORD`` after ``MARKED``, and reads it else like ``PLAIN``.

    Strength 0 is the control: the model cannot distinguish the two tokens.
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for block in changed.model.layers:  # the residual stream then passes the embedding on
            block.self_attn.o_proj.weight.mul_(0.1)
            block.mlp.down_proj.weight.mul_(0.1)
        direction = torch.nn.functional.normalize(changed.lm_head.weight[0], dim=0)
        changed.lm_head.weight[WORD] = 20 * changed.model.norm.weight * direction
        embedding = changed.get_input_embeddings().weight
        embedding[MARKED] = embedding[PLAIN] + strength * direction
    return changed


def marked_texts(n: int) -> tuple[list[Text], list[Place]]:
    """Return texts with two marked and four plain tokens at random places among others."""
    draw = torch.Generator().manual_seed(1)
    texts, places = [], []
    for t in range(n):
        ids = torch.randint(10, 40, (14,), generator=draw)
        order = torch.randperm(14, generator=draw)[:6].tolist()
        ids[order[:2]], ids[order[2:]] = MARKED, PLAIN
        texts.append(Text(f"t{t}", ids.tolist(), 1))
        others = tuple((t, p) for p in order[2:])
        places += [Place((t, p), f"kind {i}", others) for i, p in enumerate(order[:2])]
    return texts, places


def test_a_planted_effect_is_seen_and_its_control_is_not(
    make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_pair("qwen2").target
    texts, places = marked_texts(80)
    sites = sites_of(places)
    rows = rows_of(places, sites)
    contrasts = {}
    for name, strength in {"target": 5.0, "hybrid": 0.0, "part": 1.0}.items():
        reader = reader_of(name, planted(model, strength))
        odds = read(reader, texts, sites, log_odds_of([[WORD]], "model"), tmp_path)
        assert odds is not None
        contrasts[name] = Contrast.of_draws(odds[None], rows)
    references = {"part": "target"}
    summary = summarise(contrasts, references, places, rows, len(texts), ["w"], FAST)
    for kind in kinds_of(places):
        target, control, part = (
            summary[name]["kinds"][kind] for name in ("target", "hybrid", "part")
        )
        for key in ("difference", "log_odds"):
            assert target[key]["low"] > 0
            assert control[key]["low"] < 0 < control[key]["high"]
        assert target["difference"]["mean"] > 0.2
        assert (target["recovered"]["mean"], control["recovered"]["mean"]) == (1.0, 0.0)
        assert 0 < part["recovered"]["low"] < part["recovered"]["high"] < 1
        change = part["recovered"]["mean"] - 1
        assert part["change"]["mean"] == pytest.approx(change)
        cut = 1 - part["labelled"]["mean"] / target["labelled"]["mean"]
        assert part["cut"]["mean"] == pytest.approx(cut)
    assert kinds_of(places) == [ALL, "kind 0", "kind 1"]


def test_shares_of_no_gain_are_undefined() -> None:
    """A target that equals the hybrid has no contrast of which a share could be recovered."""
    texts, places = marked_texts(30)
    rows = rows_of(places, sites_of(places))
    odds = torch.randn(1, len(sites_of(places)), 1, dtype=torch.float64)
    same = Contrast.of_draws(odds, rows)
    contrasts = {"target": same, "hybrid": same}
    summary = summarise(contrasts, {}, places, rows, len(texts), ["w"], FAST)
    numbers = summary["target"]["kinds"][ALL]
    assert numbers["recovered"] == {"mean": None, "low": None, "high": None}
    assert "change" not in numbers


def test_shares_of_next_to_nothing_are_undefined() -> None:
    """A cut of 80 million percent of P = 1e-7 says nothing; nor does a share of such a contrast."""
    texts, places = marked_texts(30)
    sites = sites_of(places)
    rows = rows_of(places, sites)

    def constant(p: float) -> Contrast:
        p_sites = torch.full((len(sites),), p / 2, dtype=torch.float64)
        p_sites[rows.labelled] = p
        return Contrast.of_draws(torch.logit(p_sites)[None, :, None], rows)

    models = {"target": 0.5, "hybrid": 1e-7, "bias": 2e-7, "only": 0.1, "ablated": 0.25}
    contrasts = {name: constant(p) for name, p in models.items()}
    references = {"only": "bias", "ablated": "target"}
    nothing = {"mean": None, "low": None, "high": None}

    def numbers(name: str) -> dict[str, Any]:
        summary = summarise(contrasts, references, places, rows, len(texts), ["w"], FAST)
        numbers: dict[str, Any] = summary[name]["kinds"][ALL]
        return numbers

    assert numbers("only")["cut"] == nothing
    assert numbers("ablated")["cut"]["mean"] == pytest.approx(0.5)
    assert numbers("only")["change"]["mean"] == pytest.approx(0.2, rel=1e-4)
    contrasts["target"] = constant(1e-4)
    assert numbers("only")["change"] == numbers("only")["recovered"] == nothing


def test_a_contrast_by_hand() -> None:
    """Two places of one text, with two and one matched places; two draws; set and words."""
    rows = Rows(
        torch.tensor([0, 1]), torch.tensor([2, 3, 3]), torch.tensor([0, 0, 1]), torch.tensor([0, 0])
    )
    odds = torch.randn(2, 4, 3, dtype=torch.float64)
    got = Contrast.of_draws(odds, rows)
    p = (1 / (1 + (-odds).exp())).mean(0)
    matched = torch.stack([(p[2] + p[3]) / 2, p[3]])
    torch.testing.assert_close(got.labelled, p[:2], rtol=0, atol=1e-15)
    torch.testing.assert_close(got.matched, matched, rtol=0, atol=1e-15)
    mean = odds.mean(0)
    difference = mean[:2] - torch.stack([(mean[2] + mean[3]) / 2, mean[3]])
    torch.testing.assert_close(got.log_odds, difference, rtol=0, atol=1e-15)


@pytest.mark.slow
def test_coverage_of_all_intervals() -> None:
    """95% intervals hold the truth in 93 to 97% of experiments, with effects that differ by text.

    Texts have 0 to 5 places. P(set) is a text's own rate times a factor by model.
    """
    experiments, n = 2000, 150
    draw = torch.Generator().manual_seed(0)
    truths = {"labelled": 0.3, "matched": 0.075, "difference": 0.225, "recovered": 0.5, "cut": 0.4}
    inside = dict.fromkeys(truths, 0)
    for _ in range(experiments):
        counts = torch.randint(0, 6, (n,), generator=draw)
        text = torch.arange(n).repeat_interleave(counts)
        rate = (0.5 + torch.rand(n, generator=draw, dtype=torch.float64))[text]  # mean 1

        def noisy(p: float, rate: Tensor = rate) -> Tensor:
            wave = 0.5 + torch.rand(len(rate), generator=draw, dtype=torch.float64)
            return (p * rate * wave)[:, None]

        models = {
            "target": (0.5, 0.1),  # contrast 0.4
            "hybrid": (0.1, 0.05),  # 0.05
            "arm": (0.3, 0.075),  # 0.225
        }
        contrasts = {
            name: Contrast(noisy(a), noisy(b), torch.zeros(len(text), 1, dtype=torch.float64))
            for name, (a, b) in models.items()
        }
        places = [Place((t, 0), "w", ()) for t in text.tolist()]
        empty = torch.zeros(0, dtype=torch.int64)
        rows = Rows(empty, empty, empty, text)
        summary = summarise(contrasts, {"arm": "target"}, places, rows, n, ["w"], FAST)
        numbers = summary["arm"]["kinds"][ALL]
        for key, truth in truths.items():
            inside[key] += numbers[key]["low"] <= truth <= numbers[key]["high"]
    assert {key: 0.93 <= count / experiments <= 0.97 for key, count in inside.items()} == (
        dict.fromkeys(truths, True)
    ), inside


# --- places ---------------------------------------------------------------------------------------


def draw_candidates(n_texts: int) -> tuple[Candidates, Candidates]:
    """Return places of high entropy, a few per text, and many candidates of lower entropy."""
    draw = np.random.default_rng(0)
    place_text = np.repeat(np.arange(n_texts), 3)
    text = np.repeat(np.arange(n_texts), 60)
    return (
        Candidates(place_text, draw.gamma(6, 0.3, len(place_text))),
        Candidates(text, draw.gamma(2, 0.5, len(text))),
    )


def test_matched_places_are_balanced() -> None:
    places, candidates = draw_candidates(100)
    chosen, same = match(places, candidates, caliper=0.1, seed=0)
    gaps = candidates.entropy[chosen] - places.entropy
    assert abs(gaps.mean()) < 0.02
    assert np.abs(gaps[same]).max() <= 0.1
    assert same.mean() > 0.7
    assert len(set(chosen.tolist())) == len(chosen)
    assert (candidates.text[chosen] == places.text).tolist() == same.tolist()
    # The control: candidates at random, of the same texts, are of another entropy.
    random = np.arange(len(chosen)) // 3 * 60 + np.arange(len(chosen)) % 3
    assert abs((candidates.entropy[random] - places.entropy).mean()) > 0.5
    again, _ = match(places, candidates, caliper=0.1, seed=0)
    other, _ = match(places, candidates, caliper=0.1, seed=1)
    assert chosen.tolist() == again.tolist() != other.tolist()


def test_no_place_is_left_without_a_match() -> None:
    places, candidates = draw_candidates(4)
    exact = Candidates(candidates.text[:12], candidates.entropy[:12])
    chosen, _ = match(places, exact, caliper=0.0, seed=0)
    assert sorted(chosen.tolist()) == list(range(12))
    few = Candidates(candidates.text[:11], candidates.entropy[:11])
    with pytest.raises(UserError, match=r"at least 12 positions .* got 11; give more texts"):
        match(places, few, caliper=0.0, seed=0)


def test_places_before_words() -> None:
    """Words count in responses only; others follow a token that precedes a word somewhere."""
    texts = [
        Text("a", [9, 7, 9, 8, 9, 7, 9, 5], prompt_length=3),
        Text("b", [9, 8, 5, 5, 9], prompt_length=0),
    ]
    sites = word_sites(texts, {7: "wait", 8: "hmm"})
    assert sites.before == [((0, 2), "hmm"), ((0, 4), "wait"), ((1, 0), "hmm")]
    assert sites.others == [(0, 6)]
    with pytest.raises(UserError, match="none of 2 responses contains one of the words no"):
        word_sites(texts, {30: "no"})
    turns = Text("d", [9, 7, 9, 8, 9, 7, 9, 5], 1, spans=(1, 3, 6, 8))
    assert word_sites([turns], {7: "wait", 8: "hmm"}).before == [((0, 0), "wait")]
    two = [*texts, Text("c", [9, 5, 9, 5, 9, 5], prompt_length=1)]
    sites = word_sites(two, {7: "wait", 8: "hmm"})
    entropy = {site: float(site[0]) for site, _ in sites.before} | dict.fromkeys(sites.others, 0.0)
    places, same = matched_places(sites, entropy, caliper=0.1, seed=0)
    assert [place.site for place in places] == [site for site, _ in sites.before]
    assert [place.kind for place in places] == ["hmm", "wait", "hmm"]
    assert same == 1
    assert len({place.matched for place in places}) == 3
    measured = sites_of(places)
    rows = rows_of(places, measured)
    assert [measured[i] for i in rows.labelled.tolist()] == [place.site for place in places]
    assert [measured[i] for i in rows.matched.tolist()] == [place.matched[0] for place in places]
    assert rows.text.tolist() == [0, 0, 1]


def test_places_of_slips() -> None:
    words = "x <think> okay . first gain 3 - 4 = 7 . wait , first gain 3 + 4 = 7 . loss 7 - 1 = 6 ."
    strings = sorted(set(words.split()))
    ids = [strings.index(word) for word in words.split()]
    spaced = [f" {string}" for string in strings]
    (place,) = slip_places([Text("a", ids, 1)], spaced)
    assert (place.site, place.kind) == ((0, 11), "operation")
    assert place.matched == ((0, 21), (0, 28))
    assert [strings[ids[p]] for _, p in (place.site, *place.matched)] == ["."] * 3
    assert strings[ids[12]] == "wait"
    with pytest.raises(UserError, match=r"no slip in 1 texts.*--places words"):
        slip_places([Text("a", ids[22:], 0)], spaced)
    with pytest.raises(
        UserError, match="text b does not have the form of the embedded pair's texts"
    ):
        slip_places([Text("b", ids[12:], 0)], spaced)
