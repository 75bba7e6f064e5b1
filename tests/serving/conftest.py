"""Exports of tiny random pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt import serving
from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel


@pytest.fixture
def exported(
    save_model: Callable[..., str], tmp_path: Path
) -> Callable[..., tuple[Path, ReplacementModel]]:
    """Return a function that exports a model; it returns the folder and the model."""

    def make(
        architecture: str = "qwen2",
        config: AdapterConfig | None = None,
        dtype: str = "float32",
        **changes: Any,
    ) -> tuple[Path, ReplacementModel]:
        target = save_model("target", 0, architecture, **changes)
        base = save_model("base", 1, architecture, **changes)
        pair = ModelPair.load(PairConfig(target, base, dtype=dtype, device="cpu"))
        config = config or AdapterConfig(24)
        model = ReplacementModel.create(pair, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))
            adapter: Any
            for adapter in model.adapters:
                if config.activation == "jumprelu":
                    adapter.threshold.abs_()
                if config.activation == "batch_topk":
                    adapter.update_threshold(torch.tensor(0.123456789))
        save_adapters(model.adapters, tmp_path / "adapter")
        out = tmp_path / "exported"
        serving.export(tmp_path / "adapter", out, target=target, base=base, shard_bytes=8000)
        model.adapters.eval()
        return out, model

    return make
