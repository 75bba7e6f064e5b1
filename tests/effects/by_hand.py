"""Adapters of a tiny random pair, and its four models assembled by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter

L, D, F = 3, 16, 12


class TinyRun(NamedTuple):
    """A run's folder, and the names of its pair."""

    folder: Path
    target: str
    base: str


def random_adapters(bias: float = 0.3, seed: int = 5) -> nn.ModuleList:
    """Return adapters large enough that each feature changes predictions."""
    draw = torch.Generator().manual_seed(seed)
    adapters = nn.ModuleList(TranscoderAdapter(D, AdapterConfig(F)) for _ in range(L))
    with torch.no_grad():
        for adapter in adapters:
            for name, p in adapter.named_parameters():
                size = {"b_dec": bias, "W_enc": 0.4, "b_enc": 0.3}.get(name, 0.3)
                p.copy_(size * torch.randn(p.shape, generator=draw))
    return adapters


def token_name(i: int) -> str:
    """Return the text of a token of the tiny tokenizer."""
    return {0: "<bos>", 1: "<eos>", 2: "<pad>"}.get(i, f"w{i}")


class ByHand(nn.Module):
    """An MLP with an adapter beside it, by the formula."""

    def __init__(self, mlp: nn.Module, adapter: Any) -> None:
        super().__init__()
        self.mlp = mlp
        self.weights = [getattr(adapter, n).double() for n in ("W_enc", "b_enc", "W_dec", "b_dec")]
        self.seen: list[Tensor] = []

    def activations(self, x: Tensor) -> Tensor:
        W_enc, b_enc, *_ = self.weights
        return (x @ W_enc.T + b_enc).relu()

    def forward(self, x: Tensor) -> Tensor:
        *_, W_dec, b_dec = self.weights
        self.seen.append(x)
        out: Tensor = self.mlp(x) + self.activations(x) @ W_dec + b_dec
        return out


def models_by_hand(run: TinyRun, adapters: nn.ModuleList) -> dict[str, Any]:
    """Return target, base, hybrid and adapter as plain transformers models in float64."""
    from transformers import AutoModelForCausalLM

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()

    models = {"target": load(run.target), "base": load(run.base)}
    for name in ("hybrid", "adapter"):
        models[name] = copy.deepcopy(models["target"])
        blocks = zip(models[name].model.layers, models["base"].model.layers, adapters, strict=True)
        for block, other, adapter in blocks:
            block.mlp = other.mlp if name == "hybrid" else ByHand(other.mlp, adapter)
    return models


def kl_by_hand(target: Tensor, model: Tensor) -> Tensor:
    """Return KL(target ‖ model) of logits ``[..., V]``, a sum over tokens."""
    p, q = (logits.exp() / logits.exp().sum(-1, keepdim=True) for logits in (target, model))
    return (p * (p / q).log()).sum(-1)
