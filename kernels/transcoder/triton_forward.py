"""Implement ``fastadapt::encode``, ``decode`` and ``transcode`` on a GPU.

The functions compute the results of those in ``sparse.py``, with kernels instead of library calls.
With a dense plan or a capacity, they never synchronise with the device.

Shape suffixes: S rows of x, T tokens of a row, N = S * T, D and E widths in and out, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import triton_codes, triton_decode, triton_dense, triton_select, triton_sums
from .codes import SMALL_ENTRIES, CodeLayout, Codes, dense_codes, dense_share
from .products import decode_dense, norms
from .reference import WHOLE, TranscoderStats, codes_of, is_ranked
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
    weight_N = None if weight_N is None else weight_N.contiguous()
    kind = Activation(threshold_F, bandwidth, padding_N)
    marks = _mark(
        x_STD, W_enc_FD, b_enc_F, kind, activation, k, dense=plan is not None and plan.dense
    )
    words, values, window = marks.words, marks.values, marks.window
    flags = triton_codes.count_flags(words) if marks.flags is None else marks.flags

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
        if not marks.dense:
            window = triton_codes.spread_(words, values, kind)
        codes = dense_codes(values, window if kind.jumps else None, ordered=ordered)
    if activation == "batch_topk":
        least = _min_active(values, flags, marks.smallest, weight_N, padding_N, S)
        stats = stats._replace(min_active=least)
    return codes, stats


def decode(
    codes: Codes,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    residual_NE: Tensor | None,
    norm_F: Tensor | None,
    weight_N: Tensor | None,
    tanh_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return ``out = residual + W_decᵀ a + b_dec`` and the penalty.

    Without `norm_F`, codes take only the norms of their own rows, which is faster for few tokens.
    """
    weight_N = None if weight_N is None else weight_N.contiguous()
    if codes.dense:
        a_NF = codes.values.view(len(codes.row_offsets) - 1, -1)
        norm_F = norms(W_dec_FE) if norm_F is None else norm_F
        penalty = triton_dense.row_costs(a_NF, norm_F, weight_N, tanh_scale).sum()
        return decode_dense(a_NF, W_dec_FE, b_dec_E, residual_NE), penalty
    out, costs_N = triton_sums.decode_sums(
        codes.values, codes, W_dec_FE, b_dec_E, residual_NE, norm_F, weight_N, tanh_scale
    )
    if norm_F is None:
        costs_N = triton_sums.token_costs(codes, W_dec_FE, weight_N, tanh_scale)
    return out, costs_N.sum()


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
    """Return ``out`` alone: without codes, hence of no capacity, and without counts."""
    S, T, _ = x_STD.shape
    N, F = S * T, W_enc_FD.shape[0]
    kind = Activation(threshold_F, 0.0, padding_N)
    marks = _mark(x_STD, W_enc_FD, b_enc_F, kind, activation, k, dense=bool(dense))
    if dense is None and N * F > SMALL_ENTRIES:
        flags = triton_codes.count_flags(marks.words) if marks.flags is None else marks.flags
        dense = int(flags.counts.sum()) > dense_share(x_STD.dtype, "cuda") * N * F
    if not dense:
        return triton_decode.decode_words(marks.words, marks.values, W_dec_FE, b_dec_E, residual_NE)
    if not marks.dense:
        triton_codes.spread_(marks.words, marks.values, kind)
    return decode_dense(marks.values, W_dec_FE, b_dec_E, residual_NE)


class _Marks(NamedTuple):
    """Activations and flags of the codes."""

    words: Tensor  #: int32 [N, W].
    values: Tensor  #: [N, F]: a where a flag is set; elsewhere 0 if `dense`, else arbitrary.
    dense: bool
    window: Tensor  #: bool [N, F] for dense jumprelu, else [0].
    flags: Flags | None  #: the words with their numbers, if these were counted.
    smallest: Tensor | None  #: fp32 [N]: smallest flagged value, of batch_topk that ranks.


def _mark(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    kind: Activation,
    activation: str,
    k: float,
    *,
    dense: bool,
) -> _Marks:
    """Compute and rank the activations; `dense` zeros inactive ones where that is free."""
    S, T, _ = x_STD.shape
    x_ND = x_STD.flatten(0, 1)
    ranked = is_ranked(activation, kind.threshold_F)
    dense = dense and not ranked
    window = W_enc_FD.new_empty(0, dtype=torch.bool)
    if S * T <= FEW and not dense:
        words, values = multiply_few_and_mark(x_ND, W_enc_FD, b_enc_F, kind)
        flags = None
    else:
        values = nnf.linear(x_ND, W_enc_FD, b_enc_F)
        flags, window = mark_product(values, kind, dense=dense)
        words = flags.words
    if not ranked:
        return _Marks(words, values, dense, window, flags, None)
    smallest_N = None
    if activation == "topk":
        triton_select.keep_largest_of_tokens_(words, values, int(k))
    else:
        if kind.padding_N is None:
            count_S = torch.full((S,), codes_of(k, T), device=x_STD.device)
        else:
            count_S = (kind.padding_N == 0).view(S, T).sum(1).double()
            count_S = (k * count_S * WHOLE).floor().long()
        smallest_N = triton_select.keep_largest_(words, values, count_S)
    return _Marks(words, values, dense, window, None, smallest_N)


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
