"""Sum codes on a GPU: by token (decoder, dx, sampled product) and by feature (weights).

Every program sums in a fixed order without atomics, so equal inputs give bitwise equal results.
A program sums whole rows (slices of WIDEST columns of wider ones)::

    by token     out[t] = Σ scale[c] table[features[c]]   c in row_offsets[t] .. [t + 1]
    by feature   out[f] = Σ scale[o] table[tokens[c]]     c in feature_offsets[f] .. [f + 1],
                                                          o = order[c]

One program sums the first GPU_PIECE codes of a feature. Frequent features have further pieces,
which other programs sum; the feature's program adds these sums in order.

Shape suffixes: N tokens, E width, F features, C codes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import GPU_PIECE, Codes
from .triton_dense import penalty_of, penalty_slope
from .triton_encode import last_contiguous

# A program sums whole rows where it can, few codes at a time: all codes of a column then belong to
# one thread, and the loops need neither barriers nor shared memory.
TOKEN_SUMS: dict[str, Any] = {"BLOCK_C": 2, "num_warps": 4}
FEATURE_SUMS: dict[str, Any] = {"BLOCK_C": 2, "num_warps": 4}
WIDEST = 4096  #: columns of a program
SAMPLED: dict[str, Any] = {"BLOCK_C": 4, "BLOCK_E": 1024, "num_warps": 4}
WINDOW: dict[str, Any] = {"BLOCK_C": 1024, "num_warps": 4}


@triton.jit
def _scales(scales_ptr, values_ptr, place, live, SKIP_ZEROS: tl.constexpr):
    """fp32 factors of codes; SKIP_ZEROS sets the factor to 0 where the code's value is 0."""
    scale = tl.load(scales_ptr + place, mask=live, other=0.0).to(tl.float32)
    if SKIP_ZEROS:
        value = tl.load(values_ptr + place, mask=live, other=0.0)
        scale = tl.where(value == 0, 0.0, scale)
    return scale


@triton.jit
def sum_by_token(
    scales_ptr, values_ptr, features_ptr, row_offsets_ptr, table_ptr, bias_ptr, residual_ptr,
    norms_ptr, weights_ptr, out_ptr, costs_ptr, E, table_stride, residual_stride,
    SCALE: tl.constexpr, SKIP_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write ``residual_t + bias + Σ_c scale_c table[feature_c]``, ``w_t Σ_c φ(scale_c norm_c)``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = columns < E
    end = tl.load(row_offsets_ptr + row + 1)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    cost = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for c0 in tl.range(tl.load(row_offsets_ptr + row), end, BLOCK_C):
        place = c0 + tl.arange(0, BLOCK_C)
        live = place < end
        feature = tl.load(features_ptr + place, mask=live, other=0).to(tl.int64)
        scale = _scales(scales_ptr, values_ptr, place, live, SKIP_ZEROS)
        entries = tl.load(
            table_ptr + feature[:, None] * table_stride + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(scale[:, None] * entries, axis=0)
        if HAS_NORMS:
            norm = tl.load(norms_ptr + feature, mask=live, other=0.0)
            cost += penalty_of(scale * norm, SCALE)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        total += residual.to(tl.float32)
    tl.store(out_ptr + row * E + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
    if HAS_NORMS:
        spent = tl.sum(cost, axis=0)
        if HAS_WEIGHTS:
            spent = spent * tl.load(weights_ptr + row)
        tl.store(costs_ptr + row, spent, mask=tl.program_id(1) == 0)


@triton.jit
def cost_by_token(
    values_ptr, features_ptr, row_offsets_ptr, table_ptr, weights_ptr, costs_ptr, E, table_stride,
    SCALE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write ``w_t Σ_c φ(value_c ‖table[feature_c]‖)``; of the table, only codes' rows are read."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(row_offsets_ptr + row + 1)
    cost = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for c0 in tl.range(tl.load(row_offsets_ptr + row), end, BLOCK_C):
        place = c0 + tl.arange(0, BLOCK_C)
        live = place < end
        feature = tl.load(features_ptr + place, mask=live, other=0).to(tl.int64)
        squares = tl.zeros((BLOCK_C, BLOCK_E), dtype=tl.float32)
        for e0 in tl.range(0, E, BLOCK_E):
            columns = e0 + tl.arange(0, BLOCK_E)
            entries = tl.load(
                table_ptr + feature[:, None] * table_stride + columns[None, :],
                mask=live[:, None] & (columns < E)[None, :],
                other=0.0,
            ).to(tl.float32)
            squares += entries * entries
        value = tl.load(values_ptr + place, mask=live, other=0.0).to(tl.float32)
        cost += penalty_of(value * tl.sqrt_rn(tl.sum(squares, axis=1)), SCALE)
    spent = tl.sum(cost, axis=0)
    if HAS_WEIGHTS:
        spent = spent * tl.load(weights_ptr + row)
    tl.store(costs_ptr + row, spent)


@triton.jit(do_not_specialize=["N", "capacity"])
def sampled_product(
    g_ptr, W_ptr, features_ptr, row_offsets_ptr, norms_ptr, c_ptr, weights_ptr, values_ptr,
    da_ptr, N, E, capacity, g_stride, W_stride, SCALE: tl.constexpr, HAS_G: tl.constexpr,
    HAS_C: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write ``da_c = g_t · W[feature_c] + c w_t norm[feature_c]`` for every code.

    SCALE multiplies the norm by ``φ'(value_c norm[feature_c])``. Further programs write 0 in the
    unused tail.
    """
    row = tl.program_id(0).to(tl.int64)
    if row >= N:
        place = (row - N) * BLOCK_E + tl.arange(0, BLOCK_E)
        unused = (place >= tl.load(row_offsets_ptr + N)) & (place < capacity)
        nothing = tl.zeros((BLOCK_E,), dtype=da_ptr.dtype.element_ty)
        tl.store(da_ptr + place, nothing, mask=unused)
        return
    end = tl.load(row_offsets_ptr + row + 1)
    for c0 in tl.range(tl.load(row_offsets_ptr + row), end, BLOCK_C):
        place = c0 + tl.arange(0, BLOCK_C)
        live = place < end
        feature = tl.load(features_ptr + place, mask=live, other=0).to(tl.int64)
        da = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if HAS_G:
            products = tl.zeros((BLOCK_C, BLOCK_E), dtype=tl.float32)
            for e0 in tl.range(0, E, BLOCK_E):
                columns = e0 + tl.arange(0, BLOCK_E)
                inside = columns < E
                g = tl.load(g_ptr + row * g_stride + columns, mask=inside, other=0.0)
                W = tl.load(
                    W_ptr + feature[:, None] * W_stride + columns[None, :],
                    mask=live[:, None] & inside[None, :],
                    other=0.0,
                )
                products += g.to(tl.float32)[None, :] * W.to(tl.float32)
            da += tl.sum(products, axis=1)
        if HAS_C:
            c = tl.load(c_ptr)
            norm = tl.load(norms_ptr + feature, mask=live, other=0.0)
            cost = c * norm
            if SCALE is not None:
                value = tl.load(values_ptr + place, mask=live, other=0.0).to(tl.float32)
                cost = cost * penalty_slope(value * norm, SCALE)
            if HAS_WEIGHTS:
                cost = cost * tl.load(weights_ptr + row)
            da += cost
        tl.store(da_ptr + place, da.to(da_ptr.dtype.element_ty), mask=live)


@triton.jit
def _sum_piece(
    scales_ptr, values_ptr, order_ptr, tokens_ptr, weights_ptr, table_ptr, norms_ptr, feature,
    start, end, columns, inside, table_stride, SCALE: tl.constexpr, SKIP_ZEROS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``Σ_c scale_c table[token_c]`` and ``Σ_c w_c scale_c``, start ≤ c < end in feature order.

    SCALE multiplies the terms of the second sum by ``φ'(scale_c norm)``.
    """
    if SCALE is not None:
        norm = tl.load(norms_ptr + feature)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    weighed = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for c0 in tl.range(start, end, BLOCK_C):
        place = c0 + tl.arange(0, BLOCK_C)
        live = place < end
        code = tl.load(order_ptr + place, mask=live, other=0)
        token = tl.load(tokens_ptr + place, mask=live, other=0).to(tl.int64)
        scale = _scales(scales_ptr, values_ptr, code, live, SKIP_ZEROS)
        entries = tl.load(
            table_ptr + token[:, None] * table_stride + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(scale[:, None] * entries.to(tl.float32), axis=0)
        if SCALE is not None:
            scale = scale * penalty_slope(scale * norm, SCALE)
        if HAS_WEIGHTS:
            scale = scale * tl.load(weights_ptr + token, mask=live, other=0.0)
        weighed += scale
    return total, tl.sum(weighed, axis=0)


@triton.jit
def sum_further_pieces(
    scales_ptr, values_ptr, order_ptr, tokens_ptr, weights_ptr, feature_offsets_ptr,
    piece_offsets_ptr, table_ptr, pieces_ptr, piece_scalars_ptr, norms_ptr, F, E, table_stride,
    SCALE: tl.constexpr, SKIP_ZEROS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the sums of further pieces; each program finds its piece by binary search."""
    piece = tl.program_id(0)
    if piece >= tl.load(piece_offsets_ptr + F):
        return
    low = 0
    high = F
    while high - low > 1:  # find the last feature whose further pieces start at or before `piece`
        middle = (low + high) // 2
        if tl.load(piece_offsets_ptr + middle) <= piece:
            low = middle
        else:
            high = middle
    nth = (piece - tl.load(piece_offsets_ptr + low)).to(tl.int64) + 1
    start = tl.load(feature_offsets_ptr + low) + nth * PIECE
    end = tl.minimum(start + PIECE, tl.load(feature_offsets_ptr + low + 1))
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = columns < E
    total, weighed = _sum_piece(
        scales_ptr, values_ptr, order_ptr, tokens_ptr, weights_ptr, table_ptr, norms_ptr, low,
        start, end, columns, inside, table_stride, SCALE, SKIP_ZEROS, HAS_WEIGHTS, BLOCK_C, BLOCK_E,
    )  # fmt: skip
    tl.store(pieces_ptr + piece.to(tl.int64) * E + columns, total, mask=inside)
    tl.store(piece_scalars_ptr + piece, weighed, mask=tl.program_id(1) == 0)


@triton.jit
def sum_by_feature(
    scales_ptr, values_ptr, order_ptr, tokens_ptr, weights_ptr, feature_offsets_ptr,
    piece_offsets_ptr, table_ptr, pieces_ptr, piece_scalars_ptr, out_ptr, scalars_ptr, W_ptr,
    norms_ptr, c_ptr, E, table_stride, W_stride, SCALE: tl.constexpr, SKIP_ZEROS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_C: tl.constexpr, PIECE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write ``scalar_i = Σ_c w_c scale_c`` and ``Σ_c scale_c table[token_c]``, c over i's codes.

    SCALE multiplies the terms of the first by ``φ'(scale_c ‖W_i‖)``. HAS_C adds
    ``c scalar_i W_i / ‖W_i‖`` to the second.
    """
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = columns < E
    start = tl.load(feature_offsets_ptr + feature)
    end = tl.load(feature_offsets_ptr + feature + 1)
    total, weighed = _sum_piece(
        scales_ptr, values_ptr, order_ptr, tokens_ptr, weights_ptr, table_ptr, norms_ptr, feature,
        start, tl.minimum(end, start + PIECE), columns, inside, table_stride, SCALE, SKIP_ZEROS,
        HAS_WEIGHTS, BLOCK_C, BLOCK_E,
    )  # fmt: skip
    first = tl.load(piece_offsets_ptr + feature).to(tl.int64)
    last = tl.load(piece_offsets_ptr + feature + 1).to(tl.int64)
    for piece in tl.range(first, last):
        total += tl.load(pieces_ptr + piece * E + columns, mask=inside, other=0.0)
        weighed += tl.load(piece_scalars_ptr + piece)
    if HAS_C:
        norm = tl.load(norms_ptr + feature)
        if (end > start) & (norm > 0):
            factor = tl.div_rn(tl.load(c_ptr) * weighed, norm)
            W = tl.load(W_ptr + feature * W_stride + columns, mask=inside, other=0.0)
            total += factor * W.to(tl.float32)
    tl.store(out_ptr + feature * E + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
    scalar = weighed.to(scalars_ptr.dtype.element_ty)
    tl.store(scalars_ptr + feature, scalar, mask=tl.program_id(1) == 0)


@triton.jit
def sum_window(
    scales_ptr, values_ptr, order_ptr, feature_offsets_ptr, cut_ptr, out_ptr, half_bandwidth,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write each feature's ``Σ_c scale_c`` over its codes in JumpReLU's window."""
    feature = tl.program_id(0).to(tl.int64)
    end = tl.load(feature_offsets_ptr + feature + 1)
    cut = tl.load(cut_ptr + feature)
    window = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for c0 in tl.range(tl.load(feature_offsets_ptr + feature), end, BLOCK_C):
        place = c0 + tl.arange(0, BLOCK_C)
        live = place < end
        code = tl.load(order_ptr + place, mask=live, other=0)
        scale = tl.load(scales_ptr + code, mask=live, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + code, mask=live, other=0.0).to(tl.float32)
        near = tl.abs(value - cut) < half_bandwidth
        window += tl.where(near | (value == 0), scale, 0.0)
    tl.store(out_ptr + feature, tl.sum(window, axis=0))


def _block_of(E: int) -> int:
    """Return the columns of a program that sums rows of width E."""
    return min(WIDEST, max(16, triton.next_power_of_2(E)))


def token_sums(
    scales_C: Tensor, codes: Codes, table_FE: Tensor, *, skip_zeros: bool = False
) -> Tensor:
    """Return each token's ``Σ_c scale_c table[feature_c]``, [N, E] in the table's dtype."""
    nothing = (None,) * 5
    out, _ = decode_sums(scales_C, codes, table_FE, *nothing, skip_zeros=skip_zeros)
    return out


def decode_sums(
    scales_C: Tensor,
    codes: Codes,
    table_FE: Tensor,
    bias_E: Tensor | None,
    residual_NE: Tensor | None,
    norm_F: Tensor | None,
    weight_N: Tensor | None,
    tanh_scale: float | None,
    *,
    skip_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the decoder's output [N, E] and each token's penalty, fp32 [N].

    Without `norm_F`, the penalties are uninitialised.
    """
    N, E = len(codes.row_offsets) - 1, table_FE.shape[1]
    table_FE = last_contiguous(table_FE)
    residual_NE = None if residual_NE is None else last_contiguous(residual_NE)
    out = table_FE.new_empty(N, E)
    costs = codes.values.new_empty(N, dtype=torch.float32)
    if N:
        block = _block_of(E)
        sum_by_token[(N, max(1, triton.cdiv(E, block)))](
            scales_C,
            codes.values,
            codes.features,
            codes.row_offsets,
            table_FE,
            None if bias_E is None else bias_E.contiguous(),
            residual_NE,
            norm_F,
            weight_N,
            out,
            costs,
            E,
            table_FE.stride(0),
            0 if residual_NE is None else residual_NE.stride(0),
            SCALE=tanh_scale,
            SKIP_ZEROS=skip_zeros,
            HAS_BIAS=bias_E is not None,
            HAS_RESIDUAL=residual_NE is not None,
            HAS_NORMS=norm_F is not None,
            HAS_WEIGHTS=weight_N is not None,
            BLOCK_E=block,
            **TOKEN_SUMS,
        )
    return out, costs


def token_costs(
    codes: Codes, W_dec_FE: Tensor, weight_N: Tensor | None, tanh_scale: float | None
) -> Tensor:
    """Return each token's penalty, fp32 [N], reading only the codes' rows of the decoder."""
    N, E = len(codes.row_offsets) - 1, W_dec_FE.shape[1]
    W_dec_FE = last_contiguous(W_dec_FE)
    costs = codes.values.new_empty(N, dtype=torch.float32)
    if N:
        cost_by_token[(N,)](
            codes.values,
            codes.features,
            codes.row_offsets,
            W_dec_FE,
            weight_N,
            costs,
            E,
            W_dec_FE.stride(0),
            SCALE=tanh_scale,
            HAS_WEIGHTS=weight_N is not None,
            **SAMPLED,
        )
    return costs


def code_gradients(
    g_NE: Tensor | None,
    c: Tensor | None,
    codes: Codes,
    W_dec_FE: Tensor,
    norm_F: Tensor,
    weight_N: Tensor | None,
    tanh_scale: float | None,
) -> Tensor:
    """Return ``g_t · W_dec,i + c w_t φ'(u_ti) ‖W_dec,i‖``, [C] in the codes' dtype.

    The unused tail is 0.
    """
    N, E = len(codes.row_offsets) - 1, W_dec_FE.shape[1]
    W_dec_FE = last_contiguous(W_dec_FE)
    g_NE = None if g_NE is None else last_contiguous(g_NE)
    capacity = len(codes.values)
    da = torch.empty_like(codes.values)
    if capacity:
        sampled_product[(N + triton.cdiv(capacity, SAMPLED["BLOCK_E"]),)](
            g_NE,
            W_dec_FE,
            codes.features,
            codes.row_offsets,
            norm_F,
            c,
            weight_N,
            None if tanh_scale is None else codes.values,
            da,
            N,
            E,
            capacity,
            0 if g_NE is None else g_NE.stride(0),
            W_dec_FE.stride(0),
            SCALE=tanh_scale,
            HAS_G=g_NE is not None,
            HAS_C=c is not None,
            HAS_WEIGHTS=weight_N is not None,
            **SAMPLED,
        )
    return da


def feature_sums(
    scales_C: Tensor,
    codes: Codes,
    table_NE: Tensor,
    *,
    weight_N: Tensor | None = None,
    skip_zeros: bool = False,
    penalty: tuple[Tensor, Tensor, Tensor, float | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each feature's ``Σ_c scale_c table[token_c]`` and ``Σ_c w_c scale_c``.

    Args:
        penalty: (factor, norm_F, W_FE, tanh_scale) adds ``factor scalar_i W_i / ‖W_i‖`` to the
            first sum, 0 at a zero row; ``scalar_i`` is the second sum. A tanh_scale
            multiplies each of its terms by the tanh penalty's slope at ``scale_c ‖W_i‖``.

    Returns:
        [F, E] and [F], in the table's dtype.
    """
    F, E = len(codes.feature_offsets) - 1, table_NE.shape[1]
    table_NE = last_contiguous(table_NE)
    if F == 0 or len(table_NE) == 0:
        return table_NE.new_zeros(F, E), table_NE.new_zeros(F)
    out, scalars = table_NE.new_empty(F, E), table_NE.new_empty(F)
    c, norm_F, W_FE, tanh_scale = (None,) * 4 if penalty is None else penalty
    W_FE = None if W_FE is None else last_contiguous(W_FE)
    n_pieces = len(codes.values) // GPU_PIECE  # upper bound: a further piece follows a full one
    block = _block_of(E)
    slices = max(1, triton.cdiv(E, block))
    common = (
        scales_C,
        codes.values,
        codes.order,
        codes.tokens,
        weight_N,
        codes.feature_offsets,
        codes.piece_offsets,
        table_NE,
        table_NE.new_empty((n_pieces, E), dtype=torch.float32),
        table_NE.new_empty(n_pieces, dtype=torch.float32),
    )
    constants = {
        "SCALE": tanh_scale,
        "SKIP_ZEROS": skip_zeros,
        "HAS_WEIGHTS": weight_N is not None,
        "PIECE": GPU_PIECE,
        "BLOCK_E": block,
        **FEATURE_SUMS,
    }
    if n_pieces:
        sum_further_pieces[(n_pieces, slices)](
            *common,
            None if tanh_scale is None else norm_F,
            F,
            E,
            table_NE.stride(0),
            **constants,
        )
    sum_by_feature[(F, slices)](
        *common,
        out,
        scalars,
        W_FE,
        norm_F,
        c,
        E,
        table_NE.stride(0),
        0 if W_FE is None else W_FE.stride(0),
        HAS_C=penalty is not None,
        **constants,
    )
    return out, scalars


def window_sums(scales_C: Tensor, codes: Codes, cut_F: Tensor, half_bandwidth: float) -> Tensor:
    """Return each feature's ``Σ_c scale_c`` over JumpReLU's window, fp32 [F].

    `cut_F` is max(θ, 0).
    """
    F = len(codes.feature_offsets) - 1
    out = codes.values.new_empty(F, dtype=torch.float32)
    if F:
        sum_window[(F,)](
            scales_C,
            codes.values,
            codes.order,
            codes.feature_offsets,
            cut_F,
            out,
            half_bandwidth,
            **WINDOW,
        )
    return out
