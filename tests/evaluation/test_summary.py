"""Summaries of arrays, compared with sums by hand."""

from __future__ import annotations

import json

import pytest
import torch

from fastadapt.evaluation.faithfulness.outputs import Measured
from fastadapt.evaluation.faithfulness.partial_replacement import Family, Partial
from fastadapt.evaluation.faithfulness.summary import (
    gaps,
    order,
    partial_gaps,
    summarise_output,
    summarise_partial,
)
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.statistics import BootstrapConfig, ratio

FAST = BootstrapConfig(resamples=400)
N, LAYERS = 30, 3
TEXTS = [
    Text(f"t{i}", [3] * (6 + i % 5), prompt_length=2, domain=("math", "code", None)[i % 3])
    for i in range(N)
]
ANSWERS = [5 if i % 2 else len(text.ids) for i, text in enumerate(TEXTS)]


def measured(error: float, seed: int = 0, inside: bool = True) -> Measured:
    lengths = torch.tensor([len(text.ids) - 1 for text in TEXTS])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(int(lengths.sum()), generator=generator)
    layers = torch.rand(N, 2, LAYERS + 1, generator=generator) if inside else None
    return Measured(
        kl=drawn * error,
        agrees=drawn >= error,
        text=torch.arange(N).repeat_interleave(lengths),
        position=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        nmse=layers,
        token_nmse=None if layers is None else 2 * layers,
        l0=1.5 if inside else None,
    )


def test_means_are_over_the_stated_positions() -> None:
    arrays = measured(0.4)
    summary = summarise_output({"a": arrays, "base": measured(0.6, 1, False)}, TEXTS, ANSWERS, FAST)
    json.dumps(summary, allow_nan=False)
    a = summary["a"]
    assert a["kl"]["mean"] == pytest.approx(arrays.kl.mean().item())
    assert a["top1_error"]["mean"] == pytest.approx(1 - arrays.agrees.float().mean().item())
    assert a["kl"]["low"] < a["kl"]["mean"] < a["kl"]["high"]
    predicted = arrays.position + 1
    starts = torch.tensor(ANSWERS)[arrays.text]
    region = {
        "prompt": predicted < 2,
        "thinking": (predicted >= 2) & (predicted < starts),
        "answer": predicted >= starts,
    }
    for name, mask in region.items():
        assert a["regions"][name]["positions"] == mask.sum() > 0
        assert a["regions"][name]["kl"]["mean"] == pytest.approx(arrays.kl[mask].mean().item())
    assert list(a["domains"]) == ["code", "math"]
    math = arrays.text % 3 == 0
    assert a["domains"]["math"]["positions"] == math.sum()
    wrong = 1 - arrays.agrees[math].double().mean().item()
    assert a["domains"]["math"]["top1_error"]["mean"] == pytest.approx(wrong)
    alone = arrays.text[math].unique()
    want = ratio(
        torch.stack([arrays.kl[arrays.text == i].double().sum() for i in alone]),
        torch.stack([(arrays.text == i).sum() for i in alone]),
        bounds=(0, float("inf")),
        config=FAST,
    )
    assert a["domains"]["math"]["kl"] == pytest.approx(want.plain())  # texts of no other domain
    curve = a["by_position"]
    assert curve["edges"] == [0, 1, 2, 4, 8, 9]
    for i, interval in enumerate(curve["kl"]):
        mask = (arrays.position >= curve["edges"][i]) & (arrays.position < curve["edges"][i + 1])
        assert interval["mean"] == pytest.approx(arrays.kl[mask].mean().item())
    assert a["l0"] == 1.5
    assert arrays.nmse is not None
    assert [i["mean"] for i in a["nmse_per_layer"]] == pytest.approx(
        arrays.nmse[:, 0].mean(0).tolist()
    )
    assert arrays.token_nmse is not None
    assert [i["mean"] for i in a["nmse_token_per_layer_without_first"]] == pytest.approx(
        arrays.token_nmse[:, 1].mean(0).tolist()
    )
    assert summary["base"]["nmse_per_layer"] is summary["base"]["l0"] is None


def test_a_region_without_positions() -> None:
    never = [len(text.ids) for text in TEXTS]
    summary = summarise_output({"a": measured(0.4)}, TEXTS, never, FAST)["a"]["regions"]["answer"]
    undefined = {"mean": None, "low": None, "high": None}
    assert summary == {"kl": undefined, "top1_error": undefined, "positions": 0}


def test_the_order_of_models_is_paired() -> None:
    arrays = {"base": measured(0.6), "hybrid": measured(0.4), "a": measured(0.39)}
    summary = order(arrays, ["base", "hybrid", "a"], FAST)
    assert [(pair["above"], pair["below"]) for pair in summary] == [
        ("base", "hybrid"),
        ("hybrid", "a"),
    ]
    assert summary[0]["holds"] == "yes"
    gap = gaps(arrays["base"], arrays["hybrid"], FAST)
    assert gap["kl"]["mean"] == pytest.approx((0.6 - 0.4) / 0.6 * arrays["base"].kl.mean().item())
    backwards = order(arrays, ["a", "base"], FAST)[0]
    assert backwards["top1_error"]["high"] < 0
    assert backwards["holds"] == "no"
    same = order({"a": arrays["a"], "b": arrays["a"]}, ["a", "b"], FAST)[0]
    assert same["kl"] == {"mean": 0, "low": 0, "high": 0}
    assert same["holds"] == "tie"
    # Both share their draws, so their difference is far more certain than each alone.
    alone = summarise_output(arrays, TEXTS, ANSWERS, FAST)
    width = alone["a"]["kl"]["high"] - alone["a"]["kl"]["low"]
    paired = gaps(arrays["hybrid"], arrays["a"], FAST)["kl"]
    assert paired["high"] - paired["low"] < 0.1 * width


def partial(single: float) -> Partial:
    scale = torch.rand(N, 1, generator=torch.Generator().manual_seed(2)).double() + 0.5
    curve = torch.tensor([0, 1.0, 2, 3], dtype=torch.float64)
    kl: dict[Family, torch.Tensor] = {
        "first": scale * curve,
        "last": scale * curve * curve / 3,
        "single": scale * torch.tensor([1, single, 1 / 3], dtype=torch.float64),
    }
    wrong = {family: torch.zeros_like(sums).long() for family, sums in kl.items()}
    return Partial(kl, wrong, torch.full((N,), 10), 10)


def test_partial_replacement_against_the_full_one() -> None:
    summary = summarise_partial({"fine": partial(2.5), "worse": partial(4.0)}, FAST)
    json.dumps(summary, allow_nan=False)
    fine, worse = summary["fine"], summary["worse"]
    assert fine["within_full"]
    assert not worse["within_full"]
    assert [len(fine[family]) for family in ("first", "last", "single")] == [4, 4, 3]
    assert fine["block_passes"] == 10
    assert fine["first"][0] == fine["excess"]["first"][3] == {"mean": 0, "low": 0, "high": 0}
    full = fine["first"][3]["mean"]
    assert fine["excess"]["worst"]["mean"] == pytest.approx(-full / 6)
    assert worse["excess"]["worst"]["mean"] == pytest.approx(full / 3)
    assert worse["excess"]["worst"]["low"] > 0
    assert fine["top1_error"]["last"][3]["mean"] == 0
    gap = partial_gaps(partial(4.0), partial(2.5), "single", FAST)
    assert gap[1]["low"] > 0
    assert gap[0] == gap[2] == {"mean": 0, "low": 0, "high": 0}
