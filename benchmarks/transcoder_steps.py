"""Generate the transcoder's inputs with a given density, and run forward and backward steps.

Firing rates follow a Zipf law. Inputs lie on coarse grids, so that every pre-activation is exact in
fp32 for any order of summation. Implementations then agree on all signs and can be compared with
float64 entry by entry. T tokens, d width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks.case import Inputs, Results, cast
from fastadapt.kernels.transcoder import CodeLayout, transcoder

__all__ = [
    "BEFORE_TOPK",
    "LEAVES",
    "differentiated",
    "encoder_gemm",
    "gradients",
    "make_inputs",
    "plain",
    "reference",
    "step",
    "truth",
    "truth_of_topk",
]

LEAVES = ("x", "W_enc", "b_enc", "W_dec", "b_dec", "residual")
ALWAYS = 0.97  # fraction of active features above which all features fire on every token
NEVER_BIAS, ALWAYS_BIAS = -9.0, 9.0
BEFORE_TOPK = 4  # positive entries per token before top-k, as a multiple of k


def rates(F: int, l0: float, generator: torch.Generator) -> Tensor:
    """Return firing rates by a Zipf law in random order, at most 0.98, with sum ``l0``."""
    law = 1 / torch.arange(1, F + 1)[torch.randperm(F, generator=generator)].double()
    low, high = 0.0, 1e3 * F
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (scale, high) if (law * scale).clamp(max=0.98).sum() < l0 else (low, scale)
    return (law * low).clamp(max=0.98)


def make_inputs(
    T: int, d: int, F: int, l0: float, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Return leaves and cotangents; pre-activations are standard normal plus the bias."""
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def grid(values: Tensor, step: float) -> Tensor:
        """Round to multiples of ``step`` within ±256 steps, which are exact in every dtype."""
        return (values / step).round().clamp(-256, 256) * step

    if l0 <= 0:
        bias = torch.full((F,), NEVER_BIAS)
    elif l0 >= ALWAYS * F:
        bias = torch.full((F,), ALWAYS_BIAS)
    else:
        bias = torch.special.ndtri(rates(F, l0, host)).float()
    width = 2.0 ** round(math.log2(d) / 2)
    leaves = {
        "x": grid(normal(T, d), 2**-5),
        "W_enc": grid(normal(F, d) / d**0.5, 2**-5 / width),
        "b_enc": bias.to(device),
        "W_dec": normal(F, d) / d**0.5,
        "b_dec": normal(d),
        "residual": normal(T, d),
    }
    inputs: Inputs = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    return inputs | {
        "g": normal(T, d).to(dtype),
        "c": torch.tensor(1e-3, device=device),
    }


def gradients(inputs: Inputs, outputs: list[Tensor], cotangents: list[Tensor]) -> Results:
    """Return the gradients of all leaves, by name."""
    values = torch.autograd.grad(outputs, [inputs[name] for name in LEAVES], cotangents)
    return dict(zip((f"gradient of {name}" for name in LEAVES), values, strict=True))


def _results(inputs: Inputs, out: Tensor, penalty: Tensor) -> Results:
    cotangents = [inputs["g"], inputs["c"].to(penalty.dtype)]
    values = gradients(inputs, [out, penalty], cotangents)
    return {"out": out.detach(), "penalty": penalty.detach()} | values


def step(
    inputs: Inputs, implementation: str, plan: CodeLayout | None = None, **options: Any
) -> Results:
    """Run forward and backward of the op; return outputs and gradients."""
    leaves = {name: inputs[name] for name in LEAVES}
    out, penalty, *_ = transcoder(**leaves, plan=plan, implementation=implementation, **options)
    return _results(inputs, out, penalty)


def plain(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the transcoder in handwritten PyTorch, without statistics."""
    a = torch.relu(nnf.linear(x, W_enc, b_enc))
    return residual + (a @ W_dec + b_dec), (a.float() * W_dec.float().norm(dim=1)).sum()


def reference(**leaves: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op's reference with its statistics, to be compiled."""
    out, penalty, stats, _ = transcoder(**leaves, implementation="reference")
    return out, penalty, stats.feature_counts


def differentiated(function: Callable[..., Any]) -> Callable[[Inputs], Results]:
    """Return the step of a function that returns output, penalty and optionally more."""

    def run(inputs: Inputs) -> Results:
        out, penalty, *_ = function(**{name: inputs[name] for name in LEAVES})
        return _results(inputs, out, penalty)

    return run


def truth(inputs: Inputs, dtype: torch.dtype) -> Results:
    """Run the reference in a dtype."""
    return step(cast(inputs, dtype), "reference")


def truth_of_topk(inputs: Inputs, dtype: torch.dtype, *, k: int, penalised: bool) -> Results:
    """Compute TopK in ``dtype``, with the ranking of the inputs' dtype."""
    with torch.no_grad():
        a_NF = nnf.linear(inputs["x"], inputs["W_enc"], inputs["b_enc"]).relu()
        if penalised:
            chosen = a_NF.argsort(dim=-1, descending=True, stable=True)[:, :k]
        else:
            chosen = a_NF.topk(k, dim=-1, sorted=False).indices
        mask_NF = torch.zeros_like(a_NF, dtype=torch.bool).scatter_(1, chosen, True)
    wide = cast(inputs, dtype)
    z_NF = nnf.linear(wide["x"], wide["W_enc"], wide["b_enc"])
    a_NF = torch.where(mask_NF, z_NF, 0).relu()
    out = wide["residual"] + (a_NF @ wide["W_dec"] + wide["b_dec"])
    if not penalised:
        return {"out": out.detach()} | gradients(wide, [out], [wide["g"]])
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(wide["W_dec"], dim=-1, dtype=acc)
    return _results(wide, out, (a_NF.to(acc) @ norms).sum())


def encoder_gemm(inputs: Inputs) -> Tensor:
    """Compute the floor of the adapter: the encoder's dense product, forward only."""
    with torch.no_grad():
        return nnf.linear(inputs["x"], inputs["W_enc"], inputs["b_enc"])
