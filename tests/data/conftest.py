"""Fixtures: a word-level tokenizer with the markers of all families, and files of conversations."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastadapt.data.families import FAMILIES

WORDS: tuple[str, ...]
WORDS = ("what", "is", "1", "2", "3", "4", "+", "=", "?", ".", "wait", "so", "user")
WORDS += ("assistant", "model")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    markers = [marker for family in FAMILIES.values() for marker in family.markers]
    special = ["<pad>", "<unk>", "<eos>", *markers, "<think>", "</think>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        bos_token=FAMILIES["r1-distill"].markers[0],
        additional_special_tokens=special[4:],
    )


@pytest.fixture(scope="session")
def turns() -> Callable[[str, str], list[dict[str, str]]]:
    def make(prompt: str, response: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": prompt}, {"from": "gpt", "value": response}]

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(conversations: Sequence[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"conversations": c}, ensure_ascii=False) for c in conversations]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def selection(tmp_path: Path) -> Callable[..., Any]:
    """``selection(source=..., train=...)``: settings for splits of 1,000 and 100 conversations."""
    from fastadapt.data.prepare.selection import PrepareConfig
    from fastadapt.organism import NAMES

    def make(**changes: Any) -> PrepareConfig:
        values = {
            "output": str(tmp_path / "out"),
            "tokenizer": str(NAMES["organism/target"]),
            "train": 1000,
            "validation": 100,
            "max_tokens": 60,
            **changes,
        }
        return PrepareConfig(**values)

    return make
