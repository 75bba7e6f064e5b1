"""Passes over a dense ``[N, F]`` on a GPU, for layers with too many active entries for codes.

Products are the library's. Column sums are computed over pieces of tokens, whose sums are added in
order.

Shape suffixes: N tokens, F features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS: dict[str, Any] = {"BLOCK_F": 2048, "num_warps": 4}
COLUMNS: dict[str, Any] = {"BLOCK_N": 16, "BLOCK_F": 128, "num_warps": 4}
#: Tokens per program that sums columns.
COLUMN_TOKENS = 256


@triton.jit
def penalty_of(u, SCALE: tl.constexpr):
    """``φ(u)`` for u >= 0 in fp32; SCALE is None for L1 or c of tanh."""
    cost = u
    if SCALE is not None:
        v = u * SCALE
        e = tl.exp(-2.0 * v)
        # 1 - e cancels near 0. There, Lambert's continued fraction for tanh, to the term v² / 9,
        # has a relative error below 2e-10.
        near = tl.minimum(v, 0.5)
        q = near * near
        above = tl.where(v < 0.5, near * (945.0 + q * (105.0 + q)), 1.0 - e)
        below = tl.where(v < 0.5, 945.0 + q * (420.0 + q * 15.0), 1.0 + e)
        cost = above / below
    return cost


@triton.jit
def penalty_slope(u, SCALE: tl.constexpr):
    """``φ'(u) = c / cosh²(c u)`` for u >= 0 in fp32; no cancellation where φ saturates."""
    e = tl.exp(-2.0 * SCALE * u)
    return 4.0 * SCALE * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def cost_of_rows(a_ptr, norms_ptr, weights_ptr, costs_ptr, F, SCALE: tl.constexpr,
                 HAS_WEIGHTS: tl.constexpr, BLOCK_F: tl.constexpr):  # fmt: skip
    """Write ``w_t Σ_i φ(a_ti norm_i)``."""
    row = tl.program_id(0).to(tl.int64)
    cost = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for f0 in tl.range(0, F, BLOCK_F):
        features = f0 + tl.arange(0, BLOCK_F)
        a = tl.load(a_ptr + row * F + features, mask=features < F, other=0.0)
        norm = tl.load(norms_ptr + features, mask=features < F, other=0.0)
        cost += penalty_of(a.to(tl.float32) * norm, SCALE)
    spent = tl.sum(cost, axis=0)
    if HAS_WEIGHTS:
        spent = spent * tl.load(weights_ptr + row)
    tl.store(costs_ptr + row, spent)


@triton.jit
def finish_gradient(
    da_ptr, a_ptr, window_ptr, norms_ptr, c_ptr, weights_ptr, F, SCALE: tl.constexpr,
    HAS_G: tl.constexpr, HAS_C: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Replace da by ``da + c w_t φ'(a_ti norm_i) norm_i`` at codes and by 0 elsewhere."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = features < F
    place = row * F + features
    a = tl.load(a_ptr + place, mask=inside, other=0.0)
    keep = a != 0
    if HAS_WINDOW:
        keep = keep | (tl.load(window_ptr + place, mask=inside, other=0) != 0)
    da = tl.zeros((BLOCK_F,), dtype=tl.float32)
    if HAS_G:
        da += tl.load(da_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_C:
        c = tl.load(c_ptr)
        norm = tl.load(norms_ptr + features, mask=inside, other=0.0)
        cost = c * norm
        if SCALE is not None:
            cost = cost * penalty_slope(a.to(tl.float32) * norm, SCALE)
        if HAS_WEIGHTS:
            cost = cost * tl.load(weights_ptr + row)
        da += cost
    tl.store(da_ptr + place, tl.where(keep, da, 0.0).to(da_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def sum_columns(
    values_ptr, weights_ptr, window_ptr, norms_ptr, sums_ptr, N, F, TOKENS, SCALE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write ``Σ_t w_t value_ti`` over TOKENS tokens; a window restricts the sum to its entries.

    SCALE multiplies each value by ``φ'(value_ti norm_i)``.
    """
    features = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1).to(tl.int64)
    inside = (features < F)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for n0 in tl.range(0, TOKENS, BLOCK_N):
        rows = split * TOKENS + n0 + tl.arange(0, BLOCK_N)
        live = inside & (rows < N)[:, None]
        place = rows[:, None] * F + features[None, :]
        if HAS_WINDOW:
            live = live & (tl.load(window_ptr + place, mask=live, other=0) != 0)
        value = tl.load(values_ptr + place, mask=live, other=0.0).to(tl.float32)
        if SCALE is not None:
            norm = tl.load(norms_ptr + features, mask=features < F, other=0.0)
            value = value * penalty_slope(value * norm[None, :], SCALE)
        if HAS_WEIGHTS:
            value = value * tl.load(weights_ptr + rows, mask=rows < N, other=0.0)[:, None]
        total += value
    tl.store(sums_ptr + split * F + features, tl.sum(total, axis=0), mask=features < F)


def row_costs(
    a_NF: Tensor, norm_F: Tensor, weight_N: Tensor | None, tanh_scale: float | None
) -> Tensor:
    """Return each token's penalty, fp32 [N]."""
    N, F = a_NF.shape
    costs = norm_F.new_empty(N)
    if N:
        cost_of_rows[(N,)](
            a_NF,
            norm_F,
            weight_N,
            costs,
            F,
            SCALE=tanh_scale,
            HAS_WEIGHTS=weight_N is not None,
            **ROWS,
        )
    return costs


def finish_gradient_(
    da_NF: Tensor,
    a_NF: Tensor,
    window: Tensor | None,
    norm_F: Tensor,
    c: Tensor | None,
    weight_N: Tensor | None,
    tanh_scale: float | None,
    *,
    has_g: bool,
) -> None:
    """Add the penalty's gradient to `da` and zero inactive entries, in place.

    Without `has_g`, `da` is uninitialised and counts as 0.
    """
    N, F = a_NF.shape
    if a_NF.numel():
        finish_gradient[(N, triton.cdiv(F, ROWS["BLOCK_F"]))](
            da_NF,
            a_NF,
            None if window is None else window.view(torch.uint8),
            norm_F,
            c,
            weight_N,
            F,
            SCALE=tanh_scale,
            HAS_G=has_g,
            HAS_C=c is not None,
            HAS_WEIGHTS=weight_N is not None,
            HAS_WINDOW=window is not None,
            **ROWS,
        )


def column_sums(
    values_NF: Tensor,
    *,
    weight_N: Tensor | None = None,
    window: Tensor | None = None,
    norm_F: Tensor | None = None,
    tanh_scale: float | None = None,
) -> Tensor:
    """Return ``Σ_t w_t value_ti``, fp32 [F], over the entries in `window` (None: all).

    With `tanh_scale`, each value is multiplied by ``φ'(value_ti norm_i)``.
    """
    N, F = values_NF.shape
    splits = triton.cdiv(N, COLUMN_TOKENS)
    sums = values_NF.new_empty((splits, F), dtype=torch.float32)
    if values_NF.numel():
        sum_columns[(triton.cdiv(F, COLUMNS["BLOCK_F"]), splits)](
            values_NF,
            weight_N,
            None if window is None else window.view(torch.uint8),
            None if tanh_scale is None else norm_F,
            sums,
            N,
            F,
            COLUMN_TOKENS,
            SCALE=tanh_scale,
            HAS_WEIGHTS=weight_N is not None,
            HAS_WINDOW=window is not None,
            **COLUMNS,
        )
    return sums.sum(0)
