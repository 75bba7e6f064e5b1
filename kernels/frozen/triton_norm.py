"""RMSNorm of rows: one kernel forward, one backward.

A program holds BLOCK_R whole rows in registers::

           D columns
        [ row 0 ........ ]   read x once, write y and 1/rms
        [ row BLOCK_R-1  ]

Wide rows take a program each; narrow ones, such as heads, share one, so that every program moves
about 4,096 entries. Traffic: forward reads x and writes y; backward reads g and x and writes dx.
Weights stay in cache.

R rows, D columns.
"""

# Kernel arguments and triton have no type annotations.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows

_ENTRIES = 4096  # of a program, unless a row is longer


@triton.jit(do_not_specialize=["R"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    R,
    x_stride,
    eps,
    offset,
    D: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalise BLOCK_R rows and scale them by ``weight + offset``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    y = x * rstd[:, None]
    if ROUNDS_FIRST:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    y *= weight[None, :]
    out = out_ptr + rows[:, None] * D + columns[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < R)


@triton.jit(do_not_specialize=["R"])
def rms_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    out_ptr,
    R,
    grad_stride,
    x_stride,
    offset,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With u = g (weight + offset) and r = 1/rms: dx = r u - x r^3 mean(u x)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    grad = tl.load(
        grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0
    )
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)[:, None]
    unit = x.to(tl.float32) * rstd
    u = grad.to(tl.float32) * weight[None, :]
    mean = tl.sum(u * unit, 1) / D
    dx = rstd * (u - unit * mean[:, None])
    out = out_ptr + rows[:, None] * D + columns[None, :]
    tl.store(out, dx.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(D: int) -> dict[str, Any]:
    """Return the constants of both kernels for rows of D columns."""
    block = triton.next_power_of_2(D)
    return {
        "D": D,
        "BLOCK_R": max(1, _ENTRIES // block),
        "BLOCK_D": block,
        "num_warps": 4 if block <= 2048 else 8 if block <= 4096 else 16,
    }


def forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """Return the op's results: normalised rows in x's shape, and 1/rms [R]."""
    out = x.new_empty(x.shape)
    rows = x.shape[:-1].numel()
    rstd = x.new_empty(rows, dtype=torch.float32)
    if out.numel():
        x_RD, launch = as_rows(x), _launch(x.shape[-1])
        with torch.cuda.device_of(x):
            rms_norm_kernel[(triton.cdiv(rows, launch["BLOCK_R"]),)](
                x_RD,
                weight.contiguous(),
                out,
                rstd,
                rows,
                x_RD.stride(0),
                eps,
                offset,
                ROUNDS_FIRST=rounds_first and x.dtype != torch.float32,
                **launch,
            )
    return out, rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """Return the gradient of x, in x's shape."""
    out = x.new_empty(x.shape)
    if out.numel():
        grad_RD, x_RD, launch = as_rows(grad), as_rows(x), _launch(x.shape[-1])
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(triton.cdiv(len(rstd), launch["BLOCK_R"]),)](
                grad_RD,
                x_RD,
                weight.contiguous(),
                rstd,
                out,
                len(rstd),
                grad_RD.stride(0),
                x_RD.stride(0),
                offset,
                **launch,
            )
    return out
