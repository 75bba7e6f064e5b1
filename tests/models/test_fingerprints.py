"""Fingerprints of weights: what they notice, in small files and in large ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadapt.models.sources import fingerprint as module
from fastadapt.models.sources.fingerprint import changes, config_fingerprints, fingerprint


def change(folder: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def scale_all(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor *= 1.001


NAME = "model.embed_tokens.weight"


def middle(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME].view(-1)[len(tensors[NAME].view(-1)) // 2] += 1


def first(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME].view(-1)[0] += 1


def last(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME].view(-1)[-1] += 1


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("edit", [scale_all, first, last, middle])
def test_a_changed_weight_is_noticed(
    edit: Callable[[dict[str, torch.Tensor]], None],
    large: bool,
    save_model: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if large:
        monkeypatch.setattr(module, "_WHOLE", 0)
        monkeypatch.setattr(module, "_END", 64)
    folder = save_model("target")
    change(folder, lambda tensors: None)
    before = fingerprint(folder, None)
    change(folder, lambda tensors: None)
    assert fingerprint(folder, None) == before
    change(folder, edit)
    # The documented limit: large files are sampled at both ends of each tensor.
    assert (fingerprint(folder, None) == before) == (large and edit is middle)


def test_a_role_without_a_record_is_not_compared() -> None:
    names = {"target": "a/b", "base": "c/d"}
    weights = {"target": "1" * 64, "base": "2" * 64}
    now = {"weights": weights, "configs": {"target": "4" * 64}}
    assert changes({}, now, names) == []
    assert changes(now, now, names) == []
    assert changes(
        {"weights": {"base": "3" * 64}, "configs": {"target": "5" * 64}}, now, names
    ) == [
        "base c/d has weights 222222222222, not 333333333333",
        "target a/b has configuration 444444444444, not 555555555555",
    ]


@pytest.mark.parametrize(
    ("entries", "same"),
    [
        ({"_name_or_path": "x", "transformers_version": "9", "dtype": "bfloat16"}, True),
        ({"rms_norm_eps": 0.5}, False),
        ({"rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}, False),
    ],
)
def test_a_configuration_is_recognised_by_what_changes_outputs(
    entries: dict[str, Any], same: bool, save_model: Callable[..., str]
) -> None:
    folder = save_model("target")
    file = Path(folder) / "config.json"
    before = config_fingerprints({"target": (folder, None)})
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    assert (config_fingerprints({"target": (folder, None)}) == before) == same
