"""Compute the transcoder on codes: only active entries after the encoder's dense product.

This module is the CPU's default and the readable version of the device code. Each function is the
body of one op of ``autograd.py`` and contains no autograd. ``codes.py`` describes codes. Sums run
in a fixed order, so equal inputs give bitwise equal results.

Shape suffixes: S rows of x, T tokens of a row, N = S * T, D and E widths in and out, F features,
C codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .codes import (
    CodeLayout,
    Codes,
    activate_,
    dense_codes,
    in_window,
    pad,
    prefers_dense,
    sparse_codes,
)
from .products import decode_dense, gather_sum, norms, sampled_product, segment_sum, segments
from .reference import TranscoderStats, accumulator

# Rows counted at once: a product of ones and zeros is eight times faster than a sum of booleans.
COUNTED_ROWS = 128
# Entries of a dense a whose penalties are computed at once: few enough to stay in a cache and to
# need no buffer of a's size, and many enough for calls of torch.
ENTRIES = 2**18


def encode(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    threshold_F: Tensor | None,
    weight_N: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
    bandwidth: float,
    plan: CodeLayout | None,
    ordered: bool,
) -> tuple[Codes, TranscoderStats]:
    """Return codes and statistics, after one dense product.

    With `ordered`, codes include the feature order, which gradients need. `min_active` is -1
    without active values; the caller replaces -1 by NaN, so that results of the op compare equal.
    """
    S, T, _ = x_STD.shape
    N, F = S * T, W_enc_FD.shape[0]
    z_NF = _product(x_STD, W_enc_FD, b_enc_F, padding_N)
    window_NF = None
    if activation == "jumprelu":
        assert threshold_F is not None
        window_NF = in_window(z_NF, threshold_F, bandwidth)
        if padding_N is not None:
            window_NF &= ~padding_N[:, None]
    a_NF = activate_(z_NF, S, threshold_F, padding_N, activation, k)

    counted_N = torch.ones(N, dtype=torch.bool, device=a_NF.device)
    if weight_N is not None:
        counted_N = weight_N != 0
    if padding_N is not None:
        counted_N = counted_N & ~padding_N

    min_active = torch.full((), -1.0, device=a_NF.device)
    if plan.dense if plan else prefers_dense(a_NF, window_NF):
        codes = dense_codes(a_NF, window_NF, ordered=ordered)
        counts_F = _column_counts(a_NF, counted_N)
        n_codes = counts_F.sum()
        if weight_N is not None or window_NF is not None:
            present_NF = a_NF != 0 if window_NF is None else (a_NF != 0) | window_NF
            n_codes = present_NF.count_nonzero()
        if activation == "batch_topk":
            active_NF = (a_NF != 0) & counted_N[:, None]
            offsets_S = torch.arange(S + 1, device=a_NF.device) * (T * F)
            min_active = _mean_smallest(a_NF.flatten(), active_NF.flatten(), offsets_S)
    else:
        codes = sparse_codes(a_NF, window_NF, plan, ordered=ordered)
        live = codes.live()
        n_codes = live.row_offsets[-1].clone()
        active_C = (live.values != 0) & counted_N[segments(live.row_offsets)]
        counts_F = torch.bincount(live.features[active_C], minlength=F)
        if activation == "batch_topk":
            min_active = _mean_smallest(live.values, active_C, live.row_offsets[:: max(T, 1)])
    return codes, TranscoderStats(counts_F.sum(), counts_F, counted_N.sum(), min_active, n_codes)


def encode_backward(
    da: Tensor,
    x_ND: Tensor,
    W_enc_FD: Tensor,
    threshold_F: Tensor | None,
    padding_N: Tensor | None,
    codes: Codes,
    bandwidth: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, W_enc, b_enc and θ from the codes' `da`; unneeded ones are empty.

    ``dz_ti = da_ti·1[a_ti > 0]``, which differs from `da` only in JumpReLU's window.
    """
    (N, _), F, acc = x_ND.shape, W_enc_FD.shape[0], accumulator(x_ND.dtype)
    dx, dW, db, dtheta = (x_ND.new_empty(0) for _ in range(4))
    live = codes if codes.dense else codes.live()
    da = dz = da[: live.values.numel()]
    if threshold_F is not None:
        dz = torch.where(live.values != 0, da, 0)
    if codes.dense:
        dz_NF = dz.view(N, F)
        if need[0]:
            dx = dz_NF @ W_enc_FD
        if need[1]:
            if padding_N is not None:
                x_ND = x_ND.masked_fill(padding_N[:, None], 0)
            dW = dz_NF.T @ x_ND
        if need[2]:
            db = dz_NF.sum(0, dtype=acc)
        if need[3]:
            dtheta = torch.where(codes.window, da, 0).view(N, F).sum(0, dtype=acc)
    else:
        by = live.order
        if need[0]:
            dx = gather_sum(W_enc_FD, live.features, live.row_offsets, dz)
        if need[1]:
            dW = gather_sum(x_ND, live.tokens, live.feature_offsets, dz[by])
        if need[2]:
            db = segment_sum(dz[by], live.feature_offsets)
        if need[3]:
            assert threshold_F is not None
            near_C = in_window(live.values, threshold_F[live.features], bandwidth)
            near_C |= live.values == 0
            dtheta = segment_sum(torch.where(near_C, da, 0)[by], live.feature_offsets)
    if need[3]:
        assert threshold_F is not None
        dtheta = (-(threshold_F.double().abs() / bandwidth) * dtheta).to(threshold_F.dtype)
    return dx.to(x_ND.dtype), dW.to(x_ND.dtype), db.to(x_ND.dtype), dtheta


def decode(
    codes: Codes,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    residual_NE: Tensor | None,
    norm_F: Tensor | None,
    weight_N: Tensor | None,
    tanh_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return ``out = residual + W_decᵀ a + b_dec`` (on codes rounded once) and the penalty."""
    norm_F = norms(W_dec_FE) if norm_F is None else norm_F
    if codes.dense:
        a_NF = codes.values.view(-1, W_dec_FE.shape[0])
        if tanh_scale is None:
            penalty_N = a_NF.to(norm_F.dtype) @ norm_F
        else:
            penalty_N = _dense_costs(a_NF, norm_F, tanh_scale)
        penalty = penalty_N.sum() if weight_N is None else penalty_N @ weight_N
        return decode_dense(a_NF, W_dec_FE, b_dec_E, residual_NE), penalty
    live = codes.live()
    cost_C = live.values.to(norm_F.dtype) * norm_F[live.features]
    if tanh_scale is not None:
        cost_C.mul_(tanh_scale).tanh_()
    if weight_N is not None:
        cost_C *= weight_N[segments(live.row_offsets)]
    return _decode_sparse(live, W_dec_FE, b_dec_E, residual_NE), cost_C.sum()


def transcode(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    threshold_F: Tensor | None,
    residual_NE: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
    dense: bool | None,
) -> Tensor:
    """Return ``out`` alone, from the codes without JumpReLU's window."""
    if threshold_F is not None and activation != "jumprelu":
        threshold_F = threshold_F.to(accumulator(x_STD.dtype))
    z_NF = _product(x_STD, W_enc_FD, b_enc_F, padding_N)
    a_NF = activate_(z_NF, x_STD.shape[0], threshold_F, padding_N, activation, k)
    if prefers_dense(a_NF, None) if dense is None else dense:
        return decode_dense(a_NF, W_dec_FE, b_dec_E, residual_NE)
    codes = sparse_codes(a_NF, None, None, ordered=False)
    return _decode_sparse(codes, W_dec_FE, b_dec_E, residual_NE)


def _product(x_STD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, padding_N: Tensor | None) -> Tensor:
    """Return the pre-activations z [N, F]; those of padding are finite."""
    S, T, _ = x_STD.shape
    if padding_N is not None:
        x_STD = x_STD.masked_fill(padding_N.view(S, T, 1), 0)
    return nnf.linear(x_STD, W_enc_FD, b_enc_F).reshape(S * T, W_enc_FD.shape[0])


def _decode_sparse(
    live: Codes, W_dec_FE: Tensor, b_dec_E: Tensor, residual_NE: Tensor | None
) -> Tensor:
    """Return ``residual + W_decᵀ a + b_dec`` of codes without a tail, rounded once."""
    out_NE = gather_sum(W_dec_FE, live.features, live.row_offsets, live.values)
    out_NE += b_dec_E
    if residual_NE is not None:
        out_NE += residual_NE
    return out_NE.to(W_dec_FE.dtype)


def decode_backward(
    g_NE: Tensor | None,
    c: Tensor | None,
    codes: Codes,
    W_dec_FE: Tensor,
    norm_F: Tensor,
    weight_N: Tensor | None,
    tanh_scale: float | None,
    need_values: bool,
    need_W: bool,
) -> tuple[Tensor, Tensor]:
    """Return gradients of the codes and of W_dec from those of out (`g`) and penalty (`c`).

    ``da_ti = g_t·W_dec,i + c w_t φ'(u_ti) ‖W_dec,i‖`` and
    ``dW_dec,i = Σ_t a_ti g_t + c Σ_t w_t φ'(u_ti) a_ti W_dec,i/‖W_dec,i‖`` (0 at a zero row), with
    ``u_ti = a_ti ‖W_dec,i‖`` and ``φ' = 1`` for L1.
    In the dense layout, `da` is 0 at inactive entries. Unneeded gradients are empty.
    """
    F, E = W_dec_FE.shape
    da = dW = W_dec_FE.new_empty(0)
    spent_F = norm_F.new_zeros(F)  # Σ_t w_t φ'(u_ti) a_ti
    if codes.dense:
        a_NF = codes.values.view(-1, F)
        cost_NF = None
        if c is not None and tanh_scale is not None:
            cost_NF, spent_F = _dense_gradients(c, a_NF, norm_F, weight_N, tanh_scale)
        if need_values:
            if cost_NF is None:
                da = _dense_da(g_NE, c, a_NF, W_dec_FE, norm_F, weight_N)
            else:
                da = cost_NF if g_NE is None else cost_NF.addmm_(g_NE, W_dec_FE.T)
            if codes.window.numel() == 0:
                torch.ops.aten.threshold_backward.grad_input(da, a_NF, 0, grad_input=da)
            da = da.flatten()
        if need_W:
            dW = a_NF.new_zeros(F, E) if g_NE is None else a_NF.T @ g_NE
            if c is not None and tanh_scale is None:
                ones_N = norm_F.new_ones(len(a_NF)) if weight_N is None else weight_N
                spent_F = a_NF.to(norm_F.dtype).T @ ones_N
    else:
        live = codes.live()
        rows_C, by = segments(live.row_offsets), live.order
        g_NE = norm_F.new_zeros(len(codes.row_offsets) - 1, E) if g_NE is None else g_NE
        slope_C = None
        if c is not None and tanh_scale is not None:
            u_C = live.values.to(norm_F.dtype) * norm_F[live.features]
            slope_C = slopes_(u_C, tanh_scale)
        if need_values:
            da = sampled_product(g_NE, W_dec_FE, rows_C, live.features, live.row_offsets)
            if c is not None:
                cost_C = c * norm_F[live.features]
                cost_C = cost_C if slope_C is None else cost_C * slope_C
                da += cost_C if weight_N is None else cost_C * weight_N[rows_C]
            da = pad(da.to(codes.values.dtype), codes.values)
        if need_W:
            dW = gather_sum(g_NE, live.tokens, live.feature_offsets, live.values[by])
            if c is not None:
                weighed_C = live.values.to(norm_F.dtype)
                weighed_C = weighed_C if slope_C is None else weighed_C * slope_C
                weighed_C = weighed_C if weight_N is None else weighed_C * weight_N[rows_C]
                spent_F = segment_sum(weighed_C[by], live.feature_offsets)
    if need_W and c is not None:
        scale_F = torch.where(norm_F > 0, c * spent_F / norm_F, 0)
        dW.addcmul_(W_dec_FE.to(dW.dtype), scale_F.to(dW.dtype)[:, None])
    return da, dW.to(W_dec_FE.dtype)


def _dense_da(
    g_NE: Tensor | None,
    c: Tensor | None,
    a_NF: Tensor,
    W_dec_FE: Tensor,
    norm_F: Tensor,
    weight_N: Tensor | None,
) -> Tensor:
    """Return ``g_t·W_dec,i + c w_t ‖W_dec,i‖`` at every entry."""
    if c is None:
        assert g_NE is not None
        return g_NE @ W_dec_FE.T
    cost = c * norm_F if weight_N is None else weight_N[:, None] * (c * norm_F)
    cost = cost.to(a_NF.dtype)
    if g_NE is None:
        return cost.expand_as(a_NF).clone()
    return torch.addmm(cost, g_NE, W_dec_FE.T)


def slopes_(u: Tensor, tanh_scale: float) -> Tensor:
    """Replace u by ``φ'(u) = c / cosh²(c u)``, in place.

    ``1 - tanh²`` would cancel where the penalty saturates. There, cosh overflows to infinity and
    the slope is 0.
    """
    return u.mul_(tanh_scale).cosh_().reciprocal_().square_().mul_(tanh_scale)


def _dense_costs(a_NF: Tensor, norm_F: Tensor, tanh_scale: float) -> Tensor:
    """Return each token's ``Σ_i tanh(c u_ti)`` [N], in the norms' dtype."""
    cost_N, n = norm_F.new_empty(len(a_NF)), _rows_at_once(norm_F)
    for a_nF, cost_n in zip(a_NF.split(n), cost_N.split(n), strict=True):
        u_nF = a_nF.to(norm_F.dtype) * norm_F
        torch.sum(u_nF.mul_(tanh_scale).tanh_(), 1, out=cost_n)
    return cost_N


def _dense_gradients(
    c: Tensor, a_NF: Tensor, norm_F: Tensor, weight_N: Tensor | None, tanh_scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``c w_t φ'(u_ti) ‖W_dec,i‖`` [N, F] in a's dtype, and ``Σ_t w_t φ'(u_ti) a_ti`` [F].

    `c` is the gradient of the penalty.
    """
    cost_NF, spent_F = torch.empty_like(a_NF), torch.zeros_like(norm_F)
    by_norm_F, n = c * norm_F, _rows_at_once(norm_F)
    for start in range(0, len(a_NF), n):
        rows = slice(start, start + n)
        a_nF = a_NF[rows].to(norm_F.dtype)
        slope_nF = slopes_(a_nF * norm_F, tanh_scale)
        if weight_N is not None:
            slope_nF *= weight_N[rows, None]
        spent_F += (slope_nF * a_nF).sum(0)
        cost_NF[rows] = slope_nF.mul_(by_norm_F)
    return cost_NF, spent_F


def _rows_at_once(norm_F: Tensor) -> int:
    return max(1, ENTRIES // max(1, len(norm_F)))


def _column_counts(a_NF: Tensor, counted_N: Tensor) -> Tensor:
    """Return each feature's number of active entries in the rows of `counted_N`, int64 [F]."""
    counts_F = torch.zeros(a_NF.shape[1], dtype=torch.int64, device=a_NF.device)
    for a_nF, counted_n in zip(
        a_NF.split(COUNTED_ROWS), counted_N.split(COUNTED_ROWS), strict=True
    ):
        counts_F += (counted_n.float() @ (a_nF != 0).float()).long()
    return counts_F


def _mean_smallest(values: Tensor, is_active: Tensor, offsets_S: Tensor) -> Tensor:
    """Return the smallest active value of a segment, averaged over segments with one; else -1."""
    smallest_S = torch.segment_reduce(
        torch.where(is_active, values, torch.inf).float(), "min", offsets=offsets_S
    )
    total = nnf.pad(is_active.cumsum(0), (1, 0))
    fires_S = total[offsets_S[1:]] > total[offsets_S[:-1]]
    mean = torch.where(fires_S, smallest_S, 0).sum() / fires_S.sum()
    return torch.where(fires_S.any(), mean, -1)
