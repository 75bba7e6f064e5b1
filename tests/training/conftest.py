"""Fixtures: a pair whose training steps take milliseconds, its data, and its configuration."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastadapt.training.config import TrainConfig

BOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
WORDS = [f"w{i}" for i in range(56)]


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``target/``, ``base/`` (random Qwen2, 2 layers, width 32, 64 words) and data."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("pair")
    special = ["<pad>", "<unk>", "<eos>", BOS, USER, ASSISTANT]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "<think>", "</think>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(special)
    # Added tokens remain in any tokenizer class that transformers selects for Qwen2.
    words.add_tokens(list(vocabulary)[len(special) :])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    for seed, name in enumerate(("target", "base")):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)  # large enough that the two models disagree
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    for name, rows in (("train", 24), ("validation", 4)):
        lines = []
        for _ in range(rows):
            prompt, response = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in "ab")
            turns = [{"from": "user", "value": prompt}, {"from": "assistant", "value": response}]
            lines.append(json.dumps({"conversations": turns}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny_config(tiny_pair: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """``tiny_config(**{"optimizer.lr": 1e-3})``: a run of 12 steps on the tiny pair, on a CPU."""
    from fastadapt.training.config import from_dict

    def make(**changes: object) -> TrainConfig:
        values: dict = {
            "pair": {
                "target": str(tiny_pair / "target"),
                "base": str(tiny_pair / "base"),
                "device": "cpu",
            },
            "adapter": {"n_features": 48},
            "objective": {"sparsity": 1e-3},
            "data": {
                "train": str(tiny_pair / "train.jsonl"),
                "validation": str(tiny_pair / "validation.jsonl"),
            },
            "optimizer": {"batch_size": 2, "lr": 1e-2},
            "run": {
                "output": str(tmp_path / "run"),
                "eval_every": 5,
                "checkpoint_every": 3,
                "dead_window": 40,
                "report": False,
            },
        }
        for key, value in changes.items():
            section, name = key.split(".")
            values[section][name] = value
        return from_dict(values)

    return make
