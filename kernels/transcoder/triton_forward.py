"""Implement ``fastadapt::encode`` and ``fastadapt::decode`` on a GPU.

The functions compute the results of those in ``sparse.py``, with kernels instead of library calls.
With a plan, they never synchronise with the device.

Shape suffixes: S rows of x, T tokens of a row, N = S * T, D and E widths in and out, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import triton_codes, triton_dense, triton_select, triton_sums
from .codes import SMALL_ENTRIES, CodeLayout, Codes, dense_codes, dense_share
from .reference import WHOLE, accumulator, codes_of
from .triton_encode import (
    FEW,
    Activation,
    mark_product,
    multiply_and_mark,
    multiply_few_and_mark,
)

#: Largest number of tokens for which reading the codes' rows of W_dec twice costs less than a pass
#: over all of W_dec.
SMALL = 256


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
    fused: bool,
) -> tuple[Codes, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return codes and the fields of ``TranscoderStats``; `fused` runs the product in Triton."""
    S, T, _ = x_STD.shape
    N, F = S * T, W_enc_FD.shape[0]
    x_ND = x_STD.flatten(0, 1)
    kind = Activation(activation, threshold_F, bandwidth, padding_N)
    ranked = activation == "topk" or (activation == "batch_topk" and threshold_F is None)
    dense_directly = plan is not None and plan.dense and not ranked and not fused
    window = W_enc_FD.new_empty(0, dtype=torch.bool)
    if fused:
        words, values = multiply_and_mark(x_ND, W_enc_FD, b_enc_F, kind)
    elif N <= FEW and not dense_directly:
        words, values = multiply_few_and_mark(x_ND, W_enc_FD, b_enc_F, kind)
    else:
        values = nnf.linear(x_ND, W_enc_FD, b_enc_F)
        words, window = mark_product(values, kind, dense=dense_directly)

    smallest_N = None
    if ranked:
        if activation == "topk":
            count_G = torch.full((N,), int(k), device=x_STD.device)
        elif padding_N is None:
            count_G = torch.full((S,), codes_of(k, T), device=x_STD.device)
        else:
            count_G = (k * (~padding_N).view(S, T).sum(1).double() * WHOLE).floor().long()
        smallest_N = triton_select.keep_largest_(words, values, count_G)

    counted_N = None if weight_N is None else weight_N != 0
    if padding_N is not None:
        counted_N = ~padding_N if counted_N is None else counted_N & ~padding_N
    counts_F = triton_codes.feature_counts(words, values, counted_N, skip_zeros=kind.jumps)
    n_tokens = words.new_full((), N, dtype=torch.int64) if counted_N is None else counted_N.sum()
    rows_N = triton_codes.row_counts(words)
    offsets = rows_N.new_zeros(N + 1, dtype=torch.int64)
    torch.cumsum(rows_N, 0, dtype=torch.int64, out=offsets[1:])
    n_codes = offsets[-1].clone()
    min_active = _min_active(values, words, rows_N, smallest_N, counted_N, S, activation)

    if plan is None and not ordered and N * F <= SMALL_ENTRIES:
        plan = CodeLayout(dense=False, capacity=N * F)
    if plan is None:
        total = int(n_codes)
        plan = CodeLayout(total > dense_share(x_STD.dtype, "cuda") * N * F, total)
    if plan.dense:
        if not dense_directly:
            window = triton_codes.spread_(words, values, kind)
        codes = dense_codes(values, window if kind.jumps else None, ordered=ordered)
    else:
        capacity = int(n_codes) if plan.capacity is None else plan.capacity
        codes = triton_codes.codes_from_flags(words, values, offsets, capacity, ordered=ordered)
    return codes, counts_F.sum(), counts_F, n_tokens, min_active, n_codes


def decode(
    codes: Codes,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    residual_NE: Tensor | None,
    weight_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ``out = residual + W_decᵀ a + b_dec`` and the penalty."""
    N = len(codes.row_offsets) - 1
    weight_N = None if weight_N is None else weight_N.contiguous()
    if codes.dense:
        a_NF = codes.values.view(N, -1)
        penalty = triton_dense.row_costs(a_NF, norms(W_dec_FE), weight_N).sum()
        if residual_NE is None:
            return torch.addmm(b_dec_E, a_NF, W_dec_FE), penalty
        return torch.addmm(residual_NE, a_NF, W_dec_FE).add_(b_dec_E), penalty
    if N <= SMALL:
        out, _ = triton_sums.decode_sums(
            codes.values, codes, W_dec_FE, b_dec_E, residual_NE, None, None
        )
        return out, triton_sums.token_costs(codes, W_dec_FE, weight_N).sum()
    out, costs_N = triton_sums.decode_sums(
        codes.values, codes, W_dec_FE, b_dec_E, residual_NE, norms(W_dec_FE), weight_N
    )
    return out, costs_N.sum()


def norms(W_dec_FE: Tensor) -> Tensor:
    """Return ``‖W_dec,i‖₂``, fp32 [F]."""
    return torch.linalg.vector_norm(W_dec_FE, dim=-1, dtype=accumulator(W_dec_FE.dtype))


def _min_active(
    values_NF: Tensor,
    words: Tensor,
    rows_N: Tensor,
    smallest_N: Tensor | None,
    counted_N: Tensor | None,
    S: int,
    activation: str,
) -> Tensor:
    """Return the smallest active value of a row of x, averaged over rows with one; else -1."""
    none = values_NF.new_full((), -1.0, dtype=torch.float32)
    if activation != "batch_topk" or values_NF.numel() == 0:
        return none
    if smallest_N is None:  # with a threshold, entries were not ranked
        smallest_N = triton_select.smallest_flagged(words, values_NF)
    fires_N = rows_N > 0
    if counted_N is not None:
        fires_N &= counted_N
    fires_S = fires_N.view(S, -1).any(1)
    least_S = torch.where(fires_N, smallest_N, torch.inf).view(S, -1).amin(1)
    mean = torch.where(fires_S, least_S, 0).sum() / fires_S.sum()
    return torch.where(fires_S.any(), mean, none)
