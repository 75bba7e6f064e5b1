"""Files of sparsify: orientation, round trips, and that adapters are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sets import D, F, assert_equal, folder, make_set, outputs

from fastadapt.adapter.coder_files import CoderSet
from fastadapt.adapter.hooks import MLP_HOOKS, PLACES, Hooks
from fastadapt.errors import UserError
from fastadapt.interop.sparsify import CONFIG, WEIGHTS, read, write

CASES = [(kind, a) for kind in ("subtracting sae", "transcoder", "skip") for a in ("relu", "topk")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_round_trip(case: tuple[str, str], tmp_path: Path) -> None:
    coders, path = make_set(*case, layers=(0, 3, 12), square=True), folder(tmp_path)
    write(coders, path)
    names = {"layers.0", "layers.3", "layers.12"}
    if "sae" not in case[0]:
        names = {f"{name}.mlp" for name in names}
    assert {entry.name for entry in path.iterdir()} == names
    again = read(path)
    assert list(again.layers) == [0, 3, 12]
    assert_equal(coders, again)


def test_tensors_have_the_formats_orientation(tmp_path: Path) -> None:
    coders, path = make_set("skip", "topk", square=True), folder(tmp_path)
    write(coders, path)
    tensors = load_file(path / "layers.1.mlp" / WEIGHTS)
    config = json.loads((path / "layers.1.mlp" / CONFIG).read_text())
    assert (config["d_in"], config["num_latents"], config["k"]) == (D, F, 2)
    assert (config["transcode"], config["skip_connection"]) == (True, True)
    assert tensors["encoder.weight"].shape == tensors["W_dec"].shape == (F, D)
    # The formula of sparsify's SparseCoder, in its own words.
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(9))
    pre = torch.relu(x @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    acts, indices = pre.topk(config["k"], dim=-1)
    out = (acts[:, :, None] * tensors["W_dec"][indices]).sum(1) + tensors["b_dec"]
    out = out + x @ tensors["W_skip"].mT
    torch.testing.assert_close(out.double(), outputs(coders, x)[1], rtol=1e-5, atol=1e-5)


def test_a_file_that_sparsify_has_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "layers.6"
    path.mkdir()
    tensors = {
        "encoder.weight": torch.arange(1.0, 41.0).view(10, 4),
        "encoder.bias": torch.arange(10.0),
        "W_dec": -torch.arange(1.0, 41.0).view(10, 4),
        "b_dec": torch.arange(4.0),
    }
    save_file(tensors, path / WEIGHTS)
    config = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True}
    config |= {"num_latents": 10, "k": 3, "multi_topk": False, "skip_connection": False}
    (path / CONFIG).write_text(json.dumps({**config, "transcode": False, "d_in": 4}))
    coders = read(path)
    sae: Any = coders.layers[6]()
    assert (sae.subtract_b_dec, sae.config.activation, sae.config.k) == (True, "topk", 3)
    assert coders.hooks == Hooks(PLACES["resid_post"], PLACES["resid_post"])
    assert torch.equal(sae.W_enc, tensors["encoder.weight"])
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    config |= {"transcode": False, "d_in": 4, "signed": False}  # the last key in older files
    (path / CONFIG).write_text(json.dumps(config))
    assert_equal(coders, read(path))


def test_an_adapter_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(UserError, match=r"in place of the MLPs that they are added to.*saelens"):
        write(make_set("adapter", square=True), path)
    assert not any(path.iterdir())
    write(make_set("mlp", square=True), path)  # the control: these replace the MLPs
    assert json.loads((path / "layers.1.mlp" / CONFIG).read_text())["transcode"] is True


@pytest.mark.parametrize(
    ("kind", "activation", "more", "reason"),
    [
        ("transcoder", "jumprelu", {"square": True}, "TopK and ReLU, got jumprelu"),
        ("transcoder", "batch_topk", {"square": True}, "TopK and ReLU, got batch_topk"),
        ("transcoder", "relu", {}, "equal widths of input and output, got d_in=5 and d_out=3"),
        ("sae", "topk", {}, "subtracts b_dec from the input"),
    ],
)
def test_what_sparsify_lacks_is_refused(
    kind: str, activation: str, more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        write(make_set(kind, activation, **more), folder(tmp_path))


def test_a_place_without_a_module_is_refused(tmp_path: Path) -> None:
    coders = make_set("transcoder", square=True)
    for hooks in (
        Hooks(PLACES["resid_pre"], PLACES["mlp_out"]),
        Hooks(MLP_HOOKS.input, PLACES["mlp_contribution"]),
    ):
        with pytest.raises(UserError, match="needs the output of a module, or its input and outp"):
            write(CoderSet(coders.empty, coders.layers, hooks), folder(tmp_path, str(id(hooks))))


def test_layers_of_one_module_are_refused(tmp_path: Path) -> None:
    coders, path = make_set("transcoder", square=True), folder(tmp_path)
    hooks = Hooks({"huggingface": "model.mlp.input"}, {"huggingface": "model.mlp.output"})
    with pytest.raises(UserError, match=r"layers 0, 1 are all of 'mlp': .* has no \{layer\}"):
        write(replace(coders, hooks=hooks), path)
    assert not any(path.iterdir())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groupmax": ({"activation": "groupmax"}, "activation: expected topk"),
    "embedding": ({"embed_skip": True}, "embed_skip: expected false"),
    "table": ({"gram_lookup": True}, "gram_lookup: expected false"),
    "signed": ({"signed": True}, "signed: expected false, got true"),
    "an unknown key": ({"unknown_scale": 7.0}, "expected the keys .*, got .'unknown_scale'"),
    "k": ({"k": 8}, "k: expected 1 to num_latents=7, got 8"),
    "skip of an SAE": ({"transcode": False}, "skip_connection: expected false for an SAE"),
    "too many": ({"num_latents": 0, "expansion_factor": 1 << 25}, "expansion_factor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_this_library_does_not_compute_is_refused(case: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    write(make_set("skip", "topk", square=True), path)
    file = path / "layers.1.mlp" / CONFIG
    changes, reason = REFUSED[case]
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=reason):
        read(path)
