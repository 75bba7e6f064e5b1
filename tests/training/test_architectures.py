"""Every supported architecture is planned, trained, and generates with the trained adapters."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.replacement import ModelPair, ReplacementModel
from fastadapt.models.trained_files import load_adapters
from fastadapt.training.config import TrainConfig
from fastadapt.training.planning.estimate import plan
from fastadapt.training.trainer import train

#: The plainest block, and the one with the most norms; `make proof` trains the others.


@pytest.mark.quick("qwen2")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_of_each(
    architecture: str,
    tiny_pair: Path,
    tiny_config: Callable[..., TrainConfig],
    save_model: Callable[..., str],
    tmp_path: Path,
) -> None:
    for seed, name in enumerate(("target", "base")):
        folder = Path(save_model(name, seed, architecture, vocab_size=64))
        for file in (tiny_pair / name).glob("token*"):
            shutil.copy(file, folder)
    config = tiny_config(**{"optimizer.max_steps": 6})
    pair = dataclasses.replace(
        config.pair, target=str(tmp_path / "target"), base=str(tmp_path / "base")
    )
    config = dataclasses.replace(config, pair=pair)
    assert plan(config).peak_bytes > 0
    summary = train(config)
    assert summary["kl_adapter"] < summary["kl_hybrid"]
    adapters, _ = load_adapters(summary["adapter"])
    model = ReplacementModel(ModelPair.load(pair), adapters)
    ids = torch.tensor([[7, 8, 9]])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 7)
