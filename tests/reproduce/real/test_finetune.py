"""The LoRA's recipe on the base of the embedded pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadapt.errors import UserError
from fastadapt.organism import FOLDER
from reproduce.real import finetune as recipe
from reproduce.real.finetune import MODULES, RANK, encode, finetune

pytest.importorskip("peft")

BASE = FOLDER / "base"


def rows(n: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": text}]}
        for i, text in enumerate(["3 + 4 = 7", "4 = 4"] * (n // 2))
    ]


def train(out: Path, seed: int) -> dict[str, torch.Tensor]:
    losses: list[tuple[int, int, float]] = []
    n = finetune(BASE, rows(8), out, seed=seed, progress=lambda *u: losses.append(u))
    assert n == 8
    assert [update[:2] for update in losses] == [(1, 2), (2, 2)]
    return load_file(out / "adapter_model.safetensors")


def test_a_small_lora_of_all_linear_layers(tmp_path: Path) -> None:
    first, again, other = (train(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1)))
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.BASE
    layers = json.loads((BASE / "config.json").read_text())["num_hidden_layers"]
    assert {t.dtype for t in first.values()} == {torch.bfloat16}
    for module in MODULES:
        names = [name for name in first if f".{module}." in name]
        assert len(names) == 2 * layers  # A and B
        assert {min(first[name].shape) for name in names} == {RANK}
        assert any(first[name].abs().max() > 0 for name in names if "lora_B" in name)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_labels_are_the_assistants_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids, labels = encode(tokenizer, rows(2)[0]["messages"])
    counted = tokenizer("3 + 4 = 7<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert labels[-len(counted) :].tolist() == counted == ids[-len(counted) :].tolist()
    assert (labels[: -len(counted)] == -100).all()


def test_only_long_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "LONGEST", 2)
    with pytest.raises(UserError, match="at most 2 tokens, got none"):
        finetune(BASE, rows(2), tmp_path, seed=0, progress=print)
