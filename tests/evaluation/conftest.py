"""Finished runs of a tiny random pair, and texts for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastadapt.adapter import AdapterConfig, TranscoderAdapter
from fastadapt.adapter_files import save_adapters
from fastadapt.evaluation.texts import Text


@pytest.fixture
def make_run(tmp_path: Path, save_model: Callable[..., str]) -> Callable[..., Path]:
    """``make_run(name, seed, architecture)``: a run's folder with random adapters."""
    pairs: dict[str, dict[str, str]] = {}

    def make(name: str, seed: int = 0, architecture: str = "qwen2", **metadata: Any) -> Path:
        if architecture not in pairs:
            pairs[architecture] = {
                role: save_model(f"{architecture}-{role}", i, architecture)
                for i, role in enumerate(("target", "base"))
            }
        pair = pairs[architecture]
        generator = torch.Generator().manual_seed(seed)
        adapters = [TranscoderAdapter(16, AdapterConfig(24), generator=generator) for _ in range(3)]
        for adapter in adapters:
            drawn = 0.1 * torch.randn(adapter.W_dec.shape, generator=generator)
            adapter.W_dec.data.copy_(drawn)
        folder = tmp_path / name
        folder.mkdir()
        config = {"pair": {**pair, "device": "cpu", "dtype": "float32"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        told = {**pair, "family": "r1-distill", **metadata}
        save_adapters(adapters, folder / "adapter", told)
        return folder

    return make


@pytest.fixture
def texts() -> list[Text]:
    """Of 4 to 11 tokens, two of one length, in no order."""
    generator = torch.Generator().manual_seed(5)
    return [
        Text(
            f"t{i}",
            torch.randint(3, 40, (n,), generator=generator).tolist(),
            prompt_length=2,
            domain="math" if i % 2 else "code",
        )
        for i, n in enumerate((6, 11, 4, 9, 6))
    ]
