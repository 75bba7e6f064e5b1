"""Folders of SAEs and transcoders, and the names of their hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sets import assert_equal, make_coder, make_set, randomised

import fastadapt
from fastadapt.adapter.coder_files import CoderSet, read_coders, save_coders
from fastadapt.adapter.hooks import MLP_HOOKS, PLACES, Hooks, find_hook, name_hook
from fastadapt.errors import UserError
from fastadapt.models.trained_files import read_adapters

KINDS = ("sae", "subtracting sae", "transcoder", "skip", "adapter", "mlp")
CASES = [(kind, activation) for kind in KINDS for activation in ("relu", "topk", "jumprelu")]
CASES += [("subtracting sae", "batch_topk"), ("transcoder", "batch_topk")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_round_trip(case: tuple[str, str], tmp_path: Path) -> None:
    layers = (0, 1) if case[0] in ("adapter", "mlp") else (3, 12)
    coders = make_set(*case, layers=layers)
    save_coders(coders, tmp_path)
    again = read_coders(tmp_path)
    assert tuple(again.layers) == layers
    assert again.model == "org/model"
    assert_equal(coders, again)
    loaded, metadata = fastadapt.load_adapters(tmp_path, dtype=torch.float64)
    assert metadata["architecture"] == "qwen2"
    assert type(loaded[1]) is type(coders.empty)
    first: Any = coders.layers[layers[0]]()
    assert torch.equal(loaded[0].W_dec, first.W_dec.double())  # type: ignore[arg-type]


def test_transcoders_of_all_mlps_are_written_for_every_command(tmp_path: Path) -> None:
    coders = make_set("transcoder", square=True)
    save_coders(coders, tmp_path)
    card: Any = read_adapters(tmp_path)[1]
    assert (card["kind"], card["additive"]) == ("transcoder_adapter", False)
    assert card["adapter"].base_mlp is False
    assert card["metadata"]["target"] == card["metadata"]["base"] == "org/model"
    for i, read in enumerate(read_adapters(tmp_path)[0]):
        ours, theirs = coders.layers[i]().state_dict(), read().state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    for other in (make_set("skip", square=True), make_set("sae"), make_set("transcoder")):
        save_coders(other, tmp_path)
        with pytest.raises(UserError, match="expected adapters or weights of a baseline, got"):
            read_adapters(tmp_path)


def test_hooks_are_recorded_under_four_vocabularies(tmp_path: Path) -> None:
    fastadapt.save_adapters([make_coder("adapter")], tmp_path)
    names = json.loads((tmp_path / "fastadapt.json").read_text())["hooks"]
    assert names["input"] == {
        "huggingface": "model.layers.{layer}.mlp.input",
        "transformer_lens": "blocks.{layer}.mlp.hook_in",
        "nnterp": "mlps_input[{layer}]",
        "interp_engine": "mlp_in.{layer}",
    }
    assert names["output"] == dict(MLP_HOOKS.output)
    card = json.loads((tmp_path / "fastadapt.json").read_text())
    del card["hooks"]  # a file of an earlier version
    (tmp_path / "fastadapt.json").write_text(json.dumps(card))
    assert read_coders(tmp_path).hooks == MLP_HOOKS
    hooks = Hooks({"transformer_lens": "blocks.{layer}.attn.hook_z"}, PLACES["attn_out"])
    coders = make_set("transcoder")
    save_coders(CoderSet(coders.empty, coders.layers, hooks), tmp_path)
    assert read_coders(tmp_path).hooks == hooks


def test_every_name_of_a_place_leads_back_to_it() -> None:
    for place in PLACES.values():
        for vocabulary, pattern in place.items():
            name = name_hook(place, vocabulary, 31)  # type: ignore[arg-type]
            assert name == pattern.replace("{layer}", "31")
            assert find_hook(name, vocabulary) == (place, 31)  # type: ignore[arg-type]


def test_sets_that_cannot_be_written(tmp_path: Path) -> None:
    a, b = (randomised(make_coder("transcoder", name), 0) for name in ("relu", "topk"))
    with pytest.raises(UserError, match="layer 5 differs from layer 2 in class, configuration"):
        CoderSet.from_modules({5: a, 2: b})
    with pytest.raises(UserError, match="expected SAEs or transcoders by layer, got none"):
        CoderSet.from_modules({})
    mixed = CoderSet(a, {0: lambda: a, 7: lambda: b}, metadata={})
    with pytest.raises(UserError, match="layer 7 differs from layer 0"):
        save_coders(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [3]}, "layers: expected n_layers=2 different numbers in order"),
        ({"layers": [12, 3]}, "layers: expected n_layers=2 different numbers in order"),
        ({"layers": [3, 4]}, "layers of the adapters do not match"),
        ({"additive": True}, "'additive' must be false for sae"),
        ({"d_out": 4}, "d_out: an SAE has d_in=5, got d_out=4"),
        ({"hooks": {"input": {}, "output": {}}}, r"hooks\.input"),
    ],
)
def test_cards_that_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save_coders(make_set("subtracting sae", layers=(3, 12)), tmp_path)
    card = json.loads((tmp_path / "fastadapt.json").read_text())
    (tmp_path / "fastadapt.json").write_text(json.dumps({**card, **changes}))
    with pytest.raises(UserError, match=reason):
        read_coders(tmp_path)
