"""Finished runs of a tiny random pair, and texts for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel


@pytest.fixture
def make_run(tmp_path: Path, save_model: Callable[..., str]) -> Callable[..., Path]:
    """``make_run(name, seed, architecture, kind)``: returns a run's folder with random adapters."""
    pairs: dict[str, dict[str, str]] = {}

    def make(
        name: str,
        seed: int = 0,
        architecture: str = "qwen2",
        kind: str = "transcoder",
        dtype: str = "float32",
        n_layers: int = 3,
        **metadata: Any,
    ) -> Path:
        if architecture not in pairs:
            pairs[architecture] = {
                role: save_model(
                    f"{architecture}-{role}", i, architecture, num_hidden_layers=n_layers
                )
                for i, role in enumerate(("target", "base"))
            }
        settings: dict[str, Any] = {**pairs[architecture], "device": "cpu", "dtype": dtype}
        config: Any = AdapterConfig(24) if kind == "transcoder" else kind
        pair = ModelPair.load(PairConfig(**settings))
        model = ReplacementModel.create(pair, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"pair": settings}))
        metadata = {**pairs[architecture], "family": "r1-distill", **metadata}
        save_adapters(model.adapters, folder / "adapter", metadata)
        return folder

    return make


@pytest.fixture
def texts() -> list[Text]:
    """Texts of 4 to 11 tokens, two of them of one length, not sorted."""
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
