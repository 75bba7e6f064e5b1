"""Build the pair and the adapters of whole training steps, with real shapes and random weights.

The adapters' bias makes about L0 features fire per token. d width, F features, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.pair import ModelPair, PairConfig

__all__ = [
    "L0",
    "PAPER",
    "SMALL",
    "Sizes",
    "make_adapters",
    "make_pair",
    "model_config",
    "pair_config",
]

L0 = 10.0


@dataclass(frozen=True)
class Sizes:
    """Shapes of a pair, and lengths in tokens to time."""

    d: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    features: int
    lengths: tuple[int, ...]  #: timed; the first also of the plain step
    dtype: torch.dtype


PAPER = Sizes(
    # With 128 tokens, the time of the host determines the time of a step.
    3584, 18_944, 28, 28, 4, 152_064, 8192, (7500, 128, 10_000), torch.bfloat16,
)  # fmt: skip
SMALL = Sizes(64, 160, 3, 4, 2, 500, 256, (128,), torch.float32)


def make_pair(sizes: Sizes, device: str) -> ModelPair:
    """Build a pair with random weights, directly on the device."""
    from transformers import AutoModelForCausalLM

    config = model_config(sizes)
    torch.manual_seed(0)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype).eval()
        layer = type(target.model.layers[0].mlp)
        mlps = nn.ModuleList(layer(config).to(sizes.dtype) for _ in range(sizes.layers))
    # Make the target's MLPs small perturbations of the base's, as after fine-tuning.
    with torch.no_grad():
        for mlp, block in zip(mlps, target.model.layers, strict=True):
            for ours, theirs in zip(mlp.parameters(), block.mlp.parameters(), strict=True):
                ours.copy_(theirs + 0.05 * theirs.std() * torch.randn_like(theirs))
    pair = replace(pair_config(sizes), device=device)
    return ModelPair(target, mlps, None, pair, ARCHITECTURES["qwen2"])


def make_adapters(sizes: Sizes, device: str, implementation: str = "auto") -> nn.ModuleList:
    """Build adapters with about L0 active features per token.

    Inputs have norm sqrt(d), so z is normal with std 1/sqrt(3).
    """
    config = AdapterConfig(sizes.features, implementation=implementation)
    adapters = nn.ModuleList(
        TranscoderAdapter(sizes.d, config, device=device, dtype=sizes.dtype)
        for _ in range(sizes.layers)
    )
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - L0 / sizes.features))
    with torch.no_grad():
        for adapter in adapters:
            assert isinstance(adapter, TranscoderAdapter)
            adapter.b_enc.fill_(-float(quantile) / math.sqrt(3))
            adapter.W_dec.normal_(std=0.02 / math.sqrt(sizes.d))
    return adapters


def model_config(sizes: Sizes) -> Any:
    """Return transformers' configuration of the target."""
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=sizes.d,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
    )


def pair_config(sizes: Sizes) -> PairConfig:
    """Return the settings of a pair without files."""
    return PairConfig("target", "base", dtype=str(sizes.dtype)[6:])
