"""Implement ``fastadapt::encode`` and ``fastadapt::decode`` on a GPU.

The functions compute the results of those in ``sparse.py``, with kernels instead of library calls.
With a dense plan or a capacity, they never synchronise with the device.

Shape suffixes: S rows of x, T tokens of a row, N = S * T, D and E widths in and out, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import triton_codes, triton_dense, triton_select, triton_sums
from .codes import SMALL_ENTRIES, CodeLayout, Codes, dense_codes, dense_share
from .products import norms
from .reference import WHOLE, TranscoderStats, codes_of
from .triton_encode import (
    FEW,
    Activation,
    Flags,
    mark_product,
    multiply_few_and_mark,
)


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
    """Return codes and statistics; `min_active` is -1 without active values."""
    S, T, _ = x_STD.shape
    N, F = S * T, W_enc_FD.shape[0]
    x_ND = x_STD.flatten(0, 1)
    weight_N = None if weight_N is None else weight_N.contiguous()
    kind = Activation(activation, threshold_F, bandwidth, padding_N)
    ranked = activation == "topk" or (activation == "batch_topk" and threshold_F is None)
    dense_directly = plan is not None and plan.dense and not ranked
    window = W_enc_FD.new_empty(0, dtype=torch.bool)
    if N <= FEW and not dense_directly:
        words, values = multiply_few_and_mark(x_ND, W_enc_FD, b_enc_F, kind)
        flags = None
    else:
        values = nnf.linear(x_ND, W_enc_FD, b_enc_F)
        flags, window = mark_product(values, kind, dense=dense_directly)
        words = flags.words

    smallest_N = None
    if ranked:
        if activation == "topk":
            count_G = torch.full((N,), int(k), device=x_STD.device)
        elif padding_N is None:
            count_G = torch.full((S,), codes_of(k, T), device=x_STD.device)
        else:
            count_G = (k * (~padding_N).view(S, T).sum(1).double() * WHOLE).floor().long()
        smallest_N = triton_select.keep_largest_(words, values, count_G)
    if flags is None or ranked:
        flags = triton_codes.count_flags(words)

    if plan is None and not ordered and N * F <= SMALL_ENTRIES:
        plan = CodeLayout(dense=False, capacity=N * F)
    capacity = None if plan is None else plan.capacity
    if plan is None or (capacity is None and not plan.dense):
        capacity = int(flags.counts.sum())
        if plan is None:
            too_many = capacity > dense_share(x_STD.dtype, "cuda") * N * F
            plan = CodeLayout(too_many, capacity)
    codes, stats = triton_codes.encode_flags(
        flags, values, weight_N, kind, capacity or 0, dense=plan.dense, ordered=ordered
    )
    if plan.dense:
        if not dense_directly:
            window = triton_codes.spread_(words, values, kind)
        codes = dense_codes(values, window if kind.jumps else None, ordered=ordered)
    if activation == "batch_topk":
        least = _min_active(values, flags, smallest_N, weight_N, padding_N, S)
        stats = stats._replace(min_active=least)
    return codes, stats


def decode(
    codes: Codes,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    residual_NE: Tensor | None,
    norm_F: Tensor | None,
    weight_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ``out = residual + W_decᵀ a + b_dec`` and the penalty.

    Without `norm_F`, codes take only the norms of their own rows, which is faster for few tokens.
    """
    weight_N = None if weight_N is None else weight_N.contiguous()
    if codes.dense:
        a_NF = codes.values.view(len(codes.row_offsets) - 1, -1)
        norm_F = norms(W_dec_FE) if norm_F is None else norm_F
        penalty = triton_dense.row_costs(a_NF, norm_F, weight_N).sum()
        if residual_NE is None:
            return torch.addmm(b_dec_E, a_NF, W_dec_FE), penalty
        return torch.addmm(residual_NE, a_NF, W_dec_FE).add_(b_dec_E), penalty
    out, costs_N = triton_sums.decode_sums(
        codes.values, codes, W_dec_FE, b_dec_E, residual_NE, norm_F, weight_N
    )
    if norm_F is None:
        costs_N = triton_sums.token_costs(codes, W_dec_FE, weight_N)
    return out, costs_N.sum()


def _min_active(
    values_NF: Tensor,
    flags: Flags,
    smallest_N: Tensor | None,
    weight_N: Tensor | None,
    padding_N: Tensor | None,
    S: int,
) -> Tensor:
    """Return the smallest active value of a row of x, averaged over rows with one; else -1."""
    none = values_NF.new_full((), -1.0, dtype=torch.float32)
    if values_NF.numel() == 0:
        return none
    if smallest_N is None:  # with a threshold, entries were not ranked
        smallest_N = triton_select.smallest_flagged(flags.words, values_NF)
    fires_N = flags.counts > 0
    if weight_N is not None:
        fires_N &= weight_N != 0
    if padding_N is not None:
        fires_N &= ~padding_N
    fires_S = fires_N.view(S, -1).any(1)
    least_S = torch.where(fires_N, smallest_N, torch.inf).view(S, -1).amin(1)
    mean = torch.where(fires_S, least_S, 0).sum() / fires_S.sum()
    return torch.where(fires_S.any(), mean, none)
