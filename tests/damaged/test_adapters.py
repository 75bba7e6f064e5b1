"""Damaged folders of adapters: the card and the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Damage, sweep, variants
from safetensors.torch import load_file, save_file

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.cli.export import convert
from fastadapt.errors import UserError
from fastadapt.models.baselines import TunedMLP
from fastadapt.models.trained_files import load_adapters

#: Keys of a card that may have any value, or that no reader uses.
FREE = {"hook_in", "hook_out", "orientation", "W_enc", "W_dec", "note", "a"}
#: Names of the hooks of adapters, which have one place only.
FREE |= {"hooks", "input", "output", "huggingface", "transformer_lens", "nnterp", "interp_engine"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = AdapterConfig(8, "batch_topk", k=2.5)
    adapters = [TranscoderAdapter(6, config, d_out=4) for _ in range(2)]
    save_adapters(adapters, tmp_path / "adapter", {"note": {"a": 1}})
    return tmp_path / "adapter"


def valid_card(damage: Damage, _: Any) -> bool:
    # A bit flip may change a text that no reader uses. Earlier versions wrote no bias and base_mlp.
    absent = ("adapter.bias removed", "adapter.base_mlp removed")
    possible = damage.name in ("adapter.k 1.5", "metadata {}", *absent)
    return damage.key in FREE or damage.name.startswith("bit flip") or possible


def valid_tensors(damage: Damage, _: Any) -> bool:
    return damage.name.startswith("bit flip")  # the format has no checksum


@pytest.mark.parametrize("name", ["fastadapt.json", "layer_1.safetensors"])
def test_every_damage_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name
    valid = valid_card if name.endswith("json") else valid_tensors
    # The error of a wrong number of layers names a missing or additional file.
    sweep(path, variants(path), lambda: load_adapters(folder), valid, (name, "layer_"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_tensor(folder: Path, value: float) -> None:
    file = folder / "layer_0.safetensors"
    tensors = load_file(file)
    tensors["W_dec"][3, 1] = value
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layer_0\.safetensors: tensor W_dec: expected finite.*1"):
        load_adapters(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_codes_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "layer_0.safetensors"
    tensors = load_file(file)
    tensors["W_enc"] = tensors["W_enc"].to(dtype)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layer_0\.safetensors: tensor W_enc: expected floating"):
        load_adapters(folder)


@pytest.mark.parametrize("key", ["n_layers", "d_in", "adapter.n_features"])
def test_a_card_that_asks_for_30_million_is_refused_at_once(folder: Path, key: str) -> None:
    card = json.loads((folder / "fastadapt.json").read_text())
    holder = card["adapter"] if key.startswith("adapter.") else card
    holder[key.rpartition(".")[2]] = 30_000_000 if key != "adapter.n_features" else 10**9
    (folder / "fastadapt.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=key.rpartition(".")[2]):
        load_adapters(folder)


HISTORY = {"kind": "scale", "set": {"name": None, "size": 3}, "adapter": "ab", "sha256": "cd"}
METADATA: dict[str, list[Any]] = {
    "target": [5, ["t"], "x" * 5000, "a\0b", "a\nb", "\ud800"],
    "base": [True, {}, "x" * 5000, "a\0b"],
    "architecture": [5, ["qwen2"], "a\nb"],
    "model": [5, {}, "x" * 5000],
    "revisions": ["main", [1], {"target": 5}, {"base": "\ud800"}, {"base": "x" * 5000}],
    "family": [5, ["r1-distill"]],
    "objective": [5, [], {"sparsity": "x"}, {"sparsity": {}}, {"bridge": 10**400}]
    + [{"sparsity": v} for v in (-1, float("inf"), float("nan"), True)],
    "measured": [5, {"l0_mean": "z"}, {"l0_mean": -1}, {"l0_mean": float("inf")}]
    + [{"tokens": v} for v in (-1, 1.5, "1", 10**400)],
    "interventions": [
        *(5, [1], [{}], {}, [{**HISTORY, "set": 1}], [{**HISTORY, "scale": "1"}]),
        [{**HISTORY, "scale": 1e400}],
        [{**HISTORY, "set": {"name": "s", "size": -1}}],
    ],
}


@pytest.mark.parametrize("key", METADATA)
def test_metadata_is_judged_where_the_card_is_read(folder: Path, tmp_path: Path, key: str) -> None:
    card = json.loads((folder / "fastadapt.json").read_text())
    for value in METADATA[key]:
        card["metadata"] = {"target": "organism/target", "base": "organism/base", key: value}
        (folder / "fastadapt.json").write_text(json.dumps(card))
        for read in (load_adapters, lambda folder: convert(str(folder), str(tmp_path / "out"))):
            with pytest.raises(UserError, match=rf"fastadapt\.json: metadata\.{key}"):
                read(folder)


def test_metadata_as_all_versions_wrote_it(folder: Path) -> None:
    card = json.loads((folder / "fastadapt.json").read_text())
    names = {"target": None, "base": "/models/Größe 1", "published": {"revision": None}}
    for metadata in (
        {},
        dict.fromkeys(METADATA),
        {**names, "revisions": {"target": None, "base": "0" * 40}, "measured": {"l0_mean": None}},
        {"objective": {"sparsity": 0, "nmse": 1.0, "bridge": 1, "logits_dtype": None}},
        {"interventions": [HISTORY, {**HISTORY, "scale": -2, "run": "runs/a"}], "seed": [1]},
        {"measured": {"l0_mean": 3, "tokens": 10, "l0_per_layer": [1.0, None], "kl_adapter": None}},
    ):
        (folder / "fastadapt.json").write_text(json.dumps({**card, "metadata": metadata}))
        assert load_adapters(folder)[1] == metadata


@pytest.mark.parametrize("target", ["x" * 300, "~nobody-here/x", "a/b/c", "a b"])
def test_a_target_that_no_folder_can_be_is_told(folder: Path, tmp_path: Path, target: str) -> None:
    card = json.loads((folder / "fastadapt.json").read_text())
    card["metadata"] = {"target": target, "base": "organism/base"}
    (folder / "fastadapt.json").write_text(json.dumps(card))
    impossible = r"model .* cannot be loaded|expected a path|no home folder"
    with pytest.raises(UserError, match=impossible):
        convert(str(folder), str(tmp_path / "out"))
    for typed in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(UserError, match=impossible):
            convert(str(folder), str(tmp_path / "out"), target=typed)


def test_tuned_weights_of_names_that_no_parameter_has(tmp_path: Path) -> None:
    weights = {"up.weight": torch.ones(3, 2)}
    save_adapters([TunedMLP(2, weights)], tmp_path / "mlp")
    card = json.loads((tmp_path / "mlp" / "fastadapt.json").read_text())
    for name in ("up..weight", "", "forward", "kind", "."):
        card["tensors"] = [{name: [3, 2]}]
        (tmp_path / "mlp" / "fastadapt.json").write_text(json.dumps(card))
        save_file({name: torch.ones(3, 2)}, tmp_path / "mlp" / "layer_0.safetensors")
        with pytest.raises(UserError, match=r"layer_0\.safetensors"):
            load_adapters(tmp_path / "mlp")
