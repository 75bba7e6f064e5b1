"""The marks of the presets say where each value comes from."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from fastadapt.cli.train import PRESETS, preset_names

PAPERS = [name for name in preset_names() if name not in ("gated", "organism")]
#: What the text of arXiv 2602.20904 says. It names one pair, of 7B, and no seed.
TEXT: dict[str, Any] = {
    "target": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "base": "Qwen/Qwen2.5-Math-7B",
    "dtype": "bfloat16",
    "n_features": 8192,
    "activation": "relu",
    "sparsity": 1e-3,
    "nmse": 1.0,
    "bridge": 1.0,
    "first_cutoff": 1,
    "max_tokens": 10_000,
    "loss": "all",
    "lr": 8e-4,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip": float("inf"),
    "warmup": 0.05,
    "batch_size": 1,
    "accumulation": 1,
    "epochs": 1,
}


def marked(preset: str) -> dict[str, tuple[Any, str]]:
    """Return value and mark of each key of a preset that has a mark."""
    text = (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8")
    lines = re.findall(r"^ +(\w+): +(.+?) +# (\w+)\b", text, re.MULTILINE)
    return {key: (yaml.safe_load(value), mark) for key, value, mark in lines}


@pytest.mark.parametrize("preset", PAPERS)
def test_only_what_the_text_says_is_marked_text(preset: str) -> None:
    marks = marked(preset)
    assert {mark for _, mark in marks.values()} == {"text", "code", "here"}
    claimed = {key: value for key, (value, mark) in marks.items() if mark == "text"}
    assert claimed == {key: TEXT[key] for key in claimed if key in TEXT}
    assert len(claimed) > 12
    assert marks["seed"] == (42, "code")


def test_the_32b_pair_is_that_of_the_code() -> None:
    marks = marked("qwq-32b")
    assert {marks[key][1] for key in ("target", "base", "n_features")} == {"code"}
