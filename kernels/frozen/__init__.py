"""Elementwise operations of frozen transformer blocks: RMSNorm, gated activation, rotary embedding.

In plain PyTorch each of them is 4 to 14 kernels that read and write whole activations. Here each is
one kernel forward and one backward. Weights are constants: only activations get gradients. Saved
for the backward pass are the inputs, and one number per row of a norm.

The formulas are those of transformers' modules, in which :mod:`fastadapt.models.fused_blocks` calls
these functions. Norms and gated products round as the modules do; the rotary kernel rounds once.

B sequences, T tokens, H heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.kernels.device import runs_triton

from .autograd import gated_op, rms_norm_op, rope_op
from .reference import ACTIVATIONS, gated_reference, rms_norm_reference, rope_reference

__all__ = ["ACTIVATIONS", "DTYPES", "MAX_WIDTH", "gated", "rms_norm", "rope", "runs"]

#: Widest row of :func:`rms_norm` that its kernel holds in registers.
MAX_WIDTH = 16_384
#: Dtypes that the kernels take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IMPLEMENTATIONS = ("auto", "reference", "triton")


def runs(x: Tensor) -> bool:
    """Return whether ``auto`` selects the kernels for ``x``: on a GPU, in 16 or 32 bits.

    Example:
        >>> runs(torch.zeros(2, device="meta"))
        False
    """
    return x.is_cuda and runs_triton("cuda") and x.dtype in DTYPES


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
    implementation: str = "auto",
) -> Tensor:
    """Divide rows by their root mean square and scale them by a frozen weight.

    The formula is ``x / sqrt(mean(x^2) + eps) * (weight + offset)``, with all arithmetic in float32
    (float64 for float64 inputs); arXiv 1910.07467.

    Args:
        x: ``[..., D]``, floating.
        weight: ``[D]``, in x's dtype; gets no gradient.
        eps: added to the mean square, >= 0.
        offset: added to the weight: 1 in Gemma, else 0.
        rounds_first: the normalised row is rounded to x's dtype before it is multiplied, as in
            Llama; else the product is rounded only, as in Gemma and OLMo 2.
        implementation: "triton", "reference" (PyTorch; defines the result), or "auto": "triton"
            where :func:`runs` and D <= :data:`MAX_WIDTH`, else "reference".

    Returns:
        ``[..., D]`` in x's dtype; differentiable in x, once with "triton".

    Raises:
        TypeError, ValueError: an argument is not as above, or the kernels cannot run.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -3.0]]), torch.ones(2), 0.0)
        tensor([[ 1., -1.]])
    """
    _check(x, "x", implementation)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected {list(x.shape[-1:])}, got {list(weight.shape)}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(
            f"weight: expected {x.dtype} on {x.device} like x, got {weight.dtype} on "
            f"{weight.device}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen tensor, got one that requires a gradient")
    if implementation == "triton" and x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x: expected at most {MAX_WIDTH} columns, got {x.shape[-1]}")
    if implementation == "reference" or (
        implementation == "auto" and not (runs(x) and x.shape[-1] <= MAX_WIDTH)
    ):
        return rms_norm_reference(x, weight, eps, offset, rounds_first)
    out: Tensor = rms_norm_op(x, weight, eps, offset, rounds_first)[0]
    return out


def gated(gate: Tensor, up: Tensor, activation: str, *, implementation: str = "auto") -> Tensor:
    """Return ``activation(gate) * up``, as in SwiGLU and GeGLU (arXiv 2002.05202).

    The activation is computed in float32 and rounded to the inputs' dtype before the product.

    Args:
        gate, up: ``[..., D]`` of equal shape and dtype, floating.
        activation: one of :data:`ACTIVATIONS`: "silu", or "gelu_tanh" (tanh approximation).
        implementation: "triton", "reference" (PyTorch; defines the result), or "auto": "triton"
            where :func:`runs`, else "reference".

    Returns:
        ``[..., D]``; differentiable in gate and up, once with "triton".

    Raises:
        TypeError, ValueError: an argument is not as above, or the kernels cannot run.

    Example:
        >>> gated(torch.zeros(2), torch.ones(2), "silu")
        tensor([0., 0.])
    """
    _check(gate, "gate", implementation)
    _check(up, "up", implementation)
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"up: expected {list(gate.shape)}, {gate.dtype} on {gate.device} like gate, "
            f"got {list(up.shape)}, {up.dtype} on {up.device}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation}")
    if implementation == "reference" or (implementation == "auto" and not runs(gate)):
        return gated_reference(gate, up, activation)
    out: Tensor = gated_op(gate, up, activation)
    return out


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate the first R columns of queries and keys by the angles of their positions.

    Column i < R/2 and column i + R/2 form a pair (arXiv 2104.09864, in the halves' layout of
    transformers). Further columns are copied.

    Args:
        q, k: ``[B, H, T, D]`` with any number of heads each, floating, of one dtype.
        cos, sin: ``[B, T, R]`` or ``[1, T, R]``, R even and at most D; constants.
        implementation: "triton", "reference" (PyTorch; defines the result), or "auto": "triton"
            where :func:`runs`, else "reference".

    Returns:
        Rotated q and k, in their dtype, laid out as ``[B, T, H, D]`` in memory with "triton";
        differentiable in q and k, once with "triton".

    Raises:
        TypeError, ValueError: an argument is not as above, or the kernels cannot run.

    Example:
        >>> q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
        >>> rope(q, q, zero, one)[0].flatten()  # a quarter turn
        tensor([0., 1.])
    """
    _check(q, "q", implementation)
    _check(k, "k", implementation)
    B, _, T, D = q.shape
    if k.shape != (B, k.shape[1], T, D) or k.dtype != q.dtype:
        raise ValueError(
            f"k: expected [{B}, H, {T}, {D}] in {q.dtype} like q, got {list(k.shape)} in {k.dtype}"
        )
    R = cos.shape[-1]
    if cos.shape not in ((1, T, R), (B, T, R)) or sin.shape != cos.shape or R > D or R % 2:
        raise ValueError(
            f"cos, sin: expected [1 or {B}, {T}, R] with an even R <= {D}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if implementation == "reference" or (implementation == "auto" and not runs(q)):
        return rope_reference(q, k, cos, sin)
    q_out, k_out = rope_op(q, k, cos.detach(), sin.detach(), False)
    return q_out, k_out


def _check(x: Tensor, name: str, implementation: str) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if implementation == "triton" and x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
