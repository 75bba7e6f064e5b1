"""Implement ``fastadapt::encode_backward`` and ``fastadapt::decode_backward`` on a GPU.

The functions compute the results of those in ``sparse.py``, with kernels instead of library calls.

Shape suffixes: N tokens, D and E widths in and out, F features, C codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_dense, triton_sums
from .codes import Codes


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
    """Return gradients of x, W_enc, b_enc and θ from the codes' `da`; unneeded ones are empty."""
    (N, _), F = x_ND.shape, W_enc_FD.shape[0]
    da = da.contiguous()  # autograd passes expanded tensors, e.g. for a sum
    dx, dW, db, window_sums = (x_ND.new_empty(0) for _ in range(4))
    jumps = threshold_F is not None and bandwidth > 0
    if codes.dense:
        a_NF, dz_NF = codes.values.view(N, F), da.view(N, F)
        if need[3]:
            window_sums = triton_dense.column_sums(dz_NF, window=codes.window.view(N, F))
        if jumps:
            dz_NF = torch.where(a_NF != 0, dz_NF, 0)
        if need[0]:
            dx = dz_NF @ W_enc_FD
        if need[1]:
            if padding_N is not None:
                x_ND = x_ND.masked_fill(padding_N[:, None], 0)
            dW = dz_NF.T @ x_ND
        if need[2]:
            db = triton_dense.column_sums(dz_NF)
    else:
        if need[0]:
            dx = triton_sums.token_sums(da, codes, W_enc_FD, skip_zeros=jumps)
        if need[1] or need[2]:
            table = x_ND if need[1] else x_ND[:, :0]
            dW, db = triton_sums.feature_sums(da, codes, table, skip_zeros=jumps)
        if need[3]:
            assert threshold_F is not None
            cut_F = threshold_F.float().clamp(min=0).contiguous()
            window_sums = triton_sums.window_sums(da, codes, cut_F, bandwidth / 2)
    dtheta = x_ND.new_empty(0)
    if need[3]:
        assert threshold_F is not None
        dtheta = (-(threshold_F.double().abs() / bandwidth) * window_sums).to(threshold_F.dtype)
    none = x_ND.new_empty(0)
    return dx, dW if need[1] else none, db.to(x_ND.dtype) if need[2] else none.clone(), dtheta


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
    """Return gradients of the codes and of W_dec from those of out (`g`) and penalty (`c`)."""
    N, F = len(codes.row_offsets) - 1, W_dec_FE.shape[0]
    da = dW = W_dec_FE.new_empty(0)
    weight_N = None if weight_N is None else weight_N.contiguous()
    if codes.dense:
        a_NF = codes.values.view(N, F)
        if need_values:
            da = _dense_gradient(g_NE, c, codes, W_dec_FE, norm_F, weight_N, tanh_scale).flatten()
        if need_W:
            dW = W_dec_FE.new_zeros(F, W_dec_FE.shape[1]) if g_NE is None else a_NF.T @ g_NE
            if c is not None:
                spent_F = triton_dense.column_sums(
                    a_NF, weight_N=weight_N, norm_F=norm_F, tanh_scale=tanh_scale
                )
                scale_F = torch.where(norm_F > 0, c * spent_F / norm_F, 0)
                dW.addcmul_(W_dec_FE, scale_F.to(dW.dtype)[:, None])
        return da, dW
    if need_values:
        da = triton_sums.code_gradients(g_NE, c, codes, W_dec_FE, norm_F, weight_N, tanh_scale)
    if need_W:
        table = W_dec_FE.new_zeros(1, W_dec_FE.shape[1]).expand(N, -1) if g_NE is None else g_NE
        penalty, spent_weight_N = None, None
        if c is not None:
            penalty, spent_weight_N = (c, norm_F, W_dec_FE, tanh_scale), weight_N
        dW, _ = triton_sums.feature_sums(
            codes.values, codes, table, weight_N=spent_weight_N, penalty=penalty
        )
    return da, dW


def _dense_gradient(
    g_NE: Tensor | None,
    c: Tensor | None,
    codes: Codes,
    W_dec_FE: Tensor,
    norm_F: Tensor,
    weight_N: Tensor | None,
    tanh_scale: float | None,
) -> Tensor:
    """Return ``g_t · W_dec,i + c w_t φ'(u_ti) ‖W_dec,i‖`` at the codes, 0 elsewhere."""
    a_NF = codes.values.view(-1, W_dec_FE.shape[0])
    da_NF = torch.empty_like(a_NF) if g_NE is None else g_NE @ W_dec_FE.T
    window = codes.window.view_as(a_NF) if codes.window.numel() else None
    triton_dense.finish_gradient_(
        da_NF, a_NF, window, norm_F, c, weight_N, tanh_scale, has_g=g_NE is not None
    )
    return da_NF
