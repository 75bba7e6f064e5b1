"""Files of dictionary_learning: orientation, round trips, no pickles, and no adapters."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sets import D, F, assert_equal, folder, make_set, outputs

from fastadapt.adapter.hooks import MLP_HOOKS, PLACES, Hooks
from fastadapt.errors import UserError
from fastadapt.interop.dictionary_learning import CONFIG, WEIGHTS, read, write

#: Kind of coder and activation, and the class of dictionary_learning.
CASES = {
    ("subtracting sae", "relu"): "AutoEncoder",
    ("subtracting sae", "topk"): "AutoEncoderTopK",
    ("subtracting sae", "batch_topk"): "BatchTopKSAE",
    ("sae", "relu"): "AutoEncoderNew",
    ("sae", "jumprelu"): "JumpReluAutoEncoder",
    ("transcoder", "relu"): "AutoEncoderNew",
    ("transcoder", "jumprelu"): "JumpReluAutoEncoder",
}
#: Settings of JumpReLU that the format does not have.
LOST = ("bandwidth", "initial_threshold")


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_round_trip(case: tuple[str, str], tmp_path: Path) -> None:
    coders, path = make_set(*case, layers=(0, 3, 12), square=True), folder(tmp_path)
    write(coders, path)
    trainer = json.loads((path / "layer_12" / CONFIG).read_text())["trainer"]
    assert (trainer["dict_class"], trainer["layer"]) == (CASES[case], 12)
    assert (trainer["activation_dim"], trainer["dict_size"]) == (D, F)
    again = read(path)
    assert list(again.layers) == [0, 3, 12]
    assert again.model == "org/model"
    assert_equal(coders, again, but=LOST)


def test_tensors_have_the_formats_orientation(tmp_path: Path) -> None:
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(9))
    coders, path = make_set("subtracting sae", "topk"), folder(tmp_path)
    write(coders, path)
    t = load_file(path / "layer_1" / WEIGHTS)
    assert (t["encoder.weight"].shape, t["decoder.weight"].shape) == ((F, D), (D, F))
    assert (t["k"].item(), t["k"].dtype, t["threshold"].item()) == (2, torch.int32, -1)
    # AutoEncoderTopK, in its own words.
    acts = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    top = acts.topk(2, dim=-1)
    acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
    out = acts @ t["decoder.weight"].T + t["b_dec"]
    torch.testing.assert_close(out.double(), outputs(coders, x)[1], rtol=1e-5, atol=1e-5)

    coders, path = make_set("sae", "jumprelu"), folder(tmp_path, "jump")
    write(coders, path)
    t = load_file(path / "layer_1" / WEIGHTS)
    assert (t["W_enc"].shape, t["W_dec"].shape) == ((D, F), (F, D))
    # JumpReluAutoEncoder, in its own words.
    pre = x @ t["W_enc"] + t["b_enc"]
    f = torch.relu(pre * (pre > t["threshold"]))
    out = f @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(out.double(), outputs(coders, x)[1], rtol=1e-5, atol=1e-5)


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    """A pickle that would run code when it is read is neither read here nor by the printed line."""
    source, path = folder(tmp_path, "it's"), folder(tmp_path, "set")
    write(make_set("subtracting sae", "topk", layers=(0,)), path)
    state = load_file(path / "layer_0" / WEIGHTS)
    torch.save(state, source / "ae.pt")
    (source / CONFIG).write_text((path / "layer_0" / CONFIG).read_text())
    with pytest.raises(UserError, match="is a pickle, which can run code") as refused:
        read(source)
    line = re.search(r"python -c (.*)", str(refused.value))
    assert line is not None
    (code,) = shlex.split(line[1])
    exec(code)
    assert_equal(read(path), read(source))

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (source / WEIGHTS).unlink()
    torch.save(Hostile(), source / "ae.pt")
    with pytest.raises(UserError, match="is a pickle"):
        read(source)
    with pytest.raises(pickle.UnpicklingError):
        exec(code)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(UserError, match=r"in place of the MLPs that they are added to.*saelens"):
        write(make_set("adapter", square=True), path)
    assert not any(path.iterdir())
    write(make_set("mlp", square=True), path)  # the control: these replace the MLPs
    assert json.loads((path / "layer_1" / CONFIG).read_text())["buffer"] == {"io": "in_and_out"}


@pytest.mark.parametrize(
    ("kind", "activation", "more", "reason"),
    [
        ("transcoder", "relu", {}, "equal widths of input and output; got d_in=5, d_out=3"),
        ("skip", "relu", {"square": True}, "d_out=5 and a skip"),
        ("sae", "topk", {}, "for what reads x itself, got topk"),
        ("subtracting sae", "jumprelu", {}, "for what reads x - b_dec, got jumprelu"),
    ],
)
def test_what_dictionary_learning_lacks_is_refused(
    kind: str, activation: str, more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        write(make_set(kind, activation, **more), folder(tmp_path))


def test_a_place_without_a_name_there_is_refused(tmp_path: Path) -> None:
    """A configuration has no place of a transcoder: its reader takes the MLP."""
    for kind, place in (("transcoder", "resid_pre"), ("transcoder", "attn_out"), ("sae", "mlp_in")):
        path, hook = folder(tmp_path, f"{kind} {place}"), PLACES[place]
        hooks = Hooks(hook, hook if kind == "sae" else MLP_HOOKS.output)
        with pytest.raises(UserError, match=r"dictionary_learning needs .*, got the hooks"):
            write(replace(make_set(kind, square=True), hooks=hooks), path)
        assert not any(path.iterdir())


@pytest.mark.parametrize("name", ["mlp_out", "attn_out", "resid_post", "head_out", None])
def test_places_of_saes_come_back(name: str | None, tmp_path: Path) -> None:
    path = folder(tmp_path)
    write(make_set("sae", layers=(3, 12)), path)
    for layer in (3, 12):
        file = path / f"layer_{layer}" / CONFIG
        config = json.loads(file.read_text())
        config["trainer"]["submodule_name"] = None if name is None else f"{name}_layer_{layer}"
        file.write_text(json.dumps(config))
    coders, again = read(path), folder(tmp_path, "again")
    if name is None:
        with pytest.raises(UserError, match="or of a place that it has named, got the hooks"):
            write(coders, again)
        return
    write(coders, again)
    assert_equal(coders, read(again))
    trainer = json.loads((again / "layer_12" / CONFIG).read_text())["trainer"]
    assert trainer["submodule_name"] == f"{name}_layer_12"


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    write(make_set("subtracting sae", "topk", layers=(0,)), path)
    file, weights = path / "layer_0" / CONFIG, path / "layer_0" / WEIGHTS
    config, tensors = json.loads(file.read_text()), load_file(weights)
    for changes, reason in (
        ({"k": 3}, r"tensor k: expected trainer\.k=3, got 2"),
        ({"k": 8}, r"trainer\.k: expected 1 to dict_size=7, got 8"),
        ({"dict_class": "GatedAutoEncoder"}, r"trainer\.dict_class: expected one of AutoEncoder"),
    ):
        file.write_text(json.dumps({"trainer": {**config["trainer"], **changes}}))
        with pytest.raises(UserError, match=reason):
            read(path).layers[0]()
    file.write_text(json.dumps({**config, "buffer": {"io": "in_and_out"}}))
    with pytest.raises(UserError, match=r"buffer\.io: expected out for AutoEncoderTopK"):
        read(path)
    file.write_text(json.dumps({**config, "buffer": {"io": "in"}}))
    with pytest.raises(UserError, match=r"buffer\.io: expected out, .* got 'in'"):
        read(path)
    file.write_text(json.dumps(config))
    save_file({**tensors, "k": torch.tensor(2.0)}, weights)
    with pytest.raises(UserError, match=r"tensor k: expected an integer"):
        read(path).layers[0]()
