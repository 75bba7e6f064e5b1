"""Gated activation ``activation(gate) * up``: one kernel forward, one backward.

A program takes BLOCK columns of one row. Rows may be parts of wider ones, as where gate and up are
halves of one product. Traffic: forward reads two matrices and writes one; backward reads three and
writes two.

R rows, D columns.
"""

# Kernel arguments and triton have no type annotations.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows

_BLOCK = 1024  # columns of a program: 8 for each of 128 threads


@triton.jit
def _gate(x, SILU: tl.constexpr):
    """Return s with activation(x) = x s, 1 - s without cancellation, and the slope of s's argument.

    s is the logistic function of x for SiLU and, in GELU's tanh approximation, of
    sqrt(8/pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 is the logistic function of 2 u.
    """
    scale: tl.constexpr = 1.5957691216057308
    cubic: tl.constexpr = 0.044715
    if SILU:
        z = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    else:
        z = scale * x * (1.0 + cubic * x * x)
        slope = scale * (1.0 + 3.0 * cubic * x * x)
    small = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + small)
    s = tl.where(z < 0, small * larger, larger)
    return s, tl.where(z < 0, larger, small * larger), slope


@triton.jit
def gated_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, D, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    """Write BLOCK columns of one row of the product."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s, _, _ = _gate(x, SILU)
    dtype = out_ptr.dtype.element_ty
    out = (x * s).to(dtype).to(tl.float32) * up
    tl.store(out_ptr + row * D + columns, out.to(dtype), mask=inside)


@triton.jit
def gated_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_stride,
    gate_stride,
    up_stride,
    D,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK columns of one row of both gradients."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s, complement, slope = _gate(x, SILU)
    slope = s * (1.0 + x * slope * complement)
    dtype = grad_gate_ptr.dtype.element_ty
    grad_up = grad * (x * s).to(dtype).to(tl.float32)
    tl.store(grad_gate_ptr + row * D + columns, (grad * up * slope).to(dtype), mask=inside)
    tl.store(grad_up_ptr + row * D + columns, grad_up.to(dtype), mask=inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return the product, contiguous."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        gate_RD, up_RD = as_rows(gate), as_rows(up)
        R, D = gate_RD.shape
        with torch.cuda.device_of(gate):
            gated_kernel[(R, triton.cdiv(D, _BLOCK))](
                gate_RD,
                up_RD,
                out,
                gate_RD.stride(0),
                up_RD.stride(0),
                D,
                SILU=activation == "silu",
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, contiguous."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad.numel():
        grad_RD, gate_RD, up_RD = as_rows(grad), as_rows(gate), as_rows(up)
        R, D = gate_RD.shape
        with torch.cuda.device_of(gate):
            gated_backward_kernel[(R, triton.cdiv(D, _BLOCK))](
                grad_RD,
                gate_RD,
                up_RD,
                grad_gate,
                grad_up,
                grad_RD.stride(0),
                gate_RD.stride(0),
                up_RD.stride(0),
                D,
                SILU=activation == "silu",
                BLOCK=_BLOCK,
                num_warps=4,
            )
    return grad_gate, grad_up
