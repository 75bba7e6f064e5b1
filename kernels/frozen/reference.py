"""References in PyTorch with plain autograd: the formulas and roundings of transformers' modules.

Arithmetic is in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

#: Activations of :func:`gated_reference`.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> Tensor:
    """Return the normalised and scaled rows of ``x [..., D]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        rows = rows.to(x.dtype).to(wide)
    return (rows * (weight.to(wide) + offset)).to(x.dtype)


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``."""
    return ACTIVATIONS[activation](gate) * up


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated ``q [B, H, T, D]`` and ``k``."""
    return _rotated(q, cos[:, None], sin[:, None]), _rotated(k, cos[:, None], sin[:, None])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    R = cos.shape[-1]
    first, second, unrotated = x.split((R // 2, R // 2, x.shape[-1] - R), -1)
    turned = torch.cat((-second, first), -1)
    out = (torch.cat((first, second), -1) * cos + turned * sin).to(x.dtype)
    return torch.cat((out, unrotated), -1) if unrotated.shape[-1] else out
