"""A tiny model, and the output of the checks."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the sets of coders of the tests

IDS = torch.tensor([[5, 9, 23, 7, 31, 8, 2, 40]])
_checks: list[str] = []


def make_pair(seed: int = 0) -> tuple[Any, Any]:
    """Return a tiny Qwen2 with random weights in float64, and the embedded pair's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from fastadapt.organism import FOLDER

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.2}
    sizes["attn_implementation"] = "eager"
    config = Qwen2Config(**sizes)
    model = Qwen2ForCausalLM(config).double().eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(FOLDER / "target")


def check(line: str) -> None:
    """Print a check that passed."""
    _checks.append(line)
    print(f"  {line}", flush=True)


def report(*packages: str) -> None:
    """Print how many checks passed, with which versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"{len(_checks)} checks passed with {versions}, torch {torch.__version__}")
