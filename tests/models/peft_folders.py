"""Tiny bases with PEFT adapters whose trained weights are random."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def whole(folder: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastadapt.models.architectures import ARCHITECTURES

    # Named, since older versions of transformers choose for Gemma 2 one without its soft-cap.
    attention = ARCHITECTURES[AutoConfig.from_pretrained(folder).model_type].attention
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=attention
    )


def adapted(base: Any, settings: dict[str, Any], seed: int = 5) -> Any:
    """Return a PEFT model over ``base`` whose trained weights are random."""
    from peft import LoraConfig, get_peft_model

    chosen = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings}
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # of peft, about tied weights
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def peft_saver(tmp_path: Path, save_model: Callable[..., str]) -> Callable[..., Any]:
    """Return a function that saves a base and an adapter; it returns their folders and the PEFT
    model in float64."""

    def save(
        architecture: str = "llama",
        settings: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
    ) -> tuple[str, str, Any]:
        base = save_model("base", 1, architecture, **(changes or {}))
        wrapped = adapted(whole(base), settings or {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, which saves the embedding too
            wrapped.save_pretrained(tmp_path / "peft")
        return str(tmp_path / "peft"), base, wrapped

    return save
