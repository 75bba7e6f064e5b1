"""Random cases of the transcoder's arguments, and a run with gradients."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.kernels.testing import with_layout
from fastadapt.kernels.transcoder import ACTIVATIONS, CodeLayout, TranscoderOutput, transcoder

#: Arguments of every activation.
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 3},
    "batch_topk": {"k": 2.5},
    "jumprelu": {"bandwidth": 0.5},
}
assert SETTINGS.keys() == set(ACTIVATIONS)
SIZES = [0, 1, 2, 3, 7, 8, 9, 13, 31, 33, 64, 65]
PLANS = [
    None,
    CodeLayout(dense=True),
    CodeLayout(dense=False),
    CodeLayout(dense=False, capacity=20_000),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: Device and dtypes of Triton kernels; the interpreter multiplies bfloat16 incorrectly.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_DTYPES = [torch.float32, torch.float16]
TRITON_DTYPES += [] if os.environ.get("TRITON_INTERPRET") == "1" else [torch.bfloat16]
#: Marks of tests that are slow without a GPU.
SLOW_INTERPRETED = [] if torch.cuda.is_available() else [pytest.mark.slow]
#: The interpreter takes milliseconds per token and feature.
TRITON_SIZES = SIZES if torch.cuda.is_available() else [0, 1, 2, 3, 7, 8, 13, 31, 33]


@dataclass(frozen=True)
class Case:
    """One random choice of all arguments."""

    activation: str
    dtype: torch.dtype
    S: int | None  # None: x is [T, d_in]
    T: int
    d_in: int
    d_out: int
    F: int
    k: float
    shift: float  # added to b_enc; controls how many features fire
    coarse: bool  # values on a grid: ties, exact zeros
    inference: bool  # batch_topk with a threshold
    layouts: tuple[str, ...]
    masked: str | None
    padded: bool
    residual: bool
    plan: CodeLayout | None
    seed: int
    tanh_scale: float | None = None  # of the penalty; None: l1


def draw_inputs(
    case: Case, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Any], Tensor, Tensor]:
    """Return leaves by name, the other arguments, and cotangents of out and penalty."""
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        return (values * 2).round() / 2 if case.coarse else values

    lead = (case.T,) if case.S is None else (case.S, case.T)
    leaves = {
        "x": normal(*lead, case.d_in),
        "W_enc": normal(case.F, case.d_in) / 2 ** round(math.log2(max(1, case.d_in)) / 2),
        "b_enc": normal(case.F) + case.shift,
        "W_dec": normal(case.F, case.d_out),
        "b_dec": normal(case.d_out),
    }
    leaves["W_dec"][::3] = 0  # rows of norm 0
    if case.residual:
        leaves["residual"] = normal(*lead, case.d_out)
    arguments: dict[str, Any] = {"activation": case.activation} | tanh(case.tanh_scale)
    if case.activation in ("topk", "batch_topk"):
        arguments["k"] = min(case.k, case.F)
    if case.activation == "batch_topk":
        arguments["k"] = min(case.k / 2, case.F)
        if case.inference:
            arguments["k"] = None
            arguments["threshold"] = torch.tensor(0.5, device=device)
    if case.activation == "jumprelu":
        leaves["threshold"] = (0.1 + normal(case.F).abs() / 4).to(case.dtype).double()
        arguments["bandwidth"] = 0.75
    mask = torch.rand(lead, generator=draw)
    if case.masked:
        weights = mask > 0.3 if case.masked == "bool" else mask * (mask > 0.3)
        arguments["mask"] = with_layout(weights.to(device), case.layouts[-2])
    if case.padded:
        padding = (torch.rand(lead, generator=draw) > 0.7).to(device)
        arguments["padding"] = with_layout(padding, case.layouts[-3])
    layouts = case.layouts
    if device == "cpu" and case.dtype == torch.bfloat16:
        # torch's bf16 products on a CPU read beyond the end of such rows, into NaN, also in the
        # reference (torch 2.13 with AMX: 31 of a parent's 36 columns, every second row of 3).
        gaps = ("parent", "sliced")
        layouts = tuple("offset" if layout in gaps else layout for layout in layouts)
    leaves = {
        name: with_layout(leaf.to(device, case.dtype), layout)
        for (name, leaf), layout in zip(leaves.items(), layouts, strict=False)
    }
    cotangent = with_layout(normal(*lead, case.d_out).to(device, case.dtype), layouts[-1])
    return leaves, arguments, cotangent, torch.randn((), generator=draw).to(device)


def tanh(scale: float | None) -> dict[str, Any]:
    """Return the arguments of a tanh penalty; none without a scale, for l1."""
    return {} if scale is None else {"penalty": "tanh", "penalty_scale": scale}


def run(
    leaves: dict[str, Any],
    arguments: dict[str, Any],
    cotangent: Tensor,
    c: Tensor,
    *,
    dtype: torch.dtype,
    implementation: str,
    plan: CodeLayout | None = None,
) -> tuple[TranscoderOutput, dict[str, Tensor]]:
    """Return the op's outputs and the gradients of all leaves."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves.items()}
    result = transcoder(**leaves, **arguments, implementation=implementation, plan=plan)
    cotangents = [cotangent.to(dtype), c.to(result.penalty.dtype)]
    grads = torch.autograd.grad(
        [result.out, result.penalty], list(leaves.values()), cotangents, allow_unused=True
    )
    named = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return result, named
