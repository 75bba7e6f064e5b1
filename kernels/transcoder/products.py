"""Multiply codes with tables (of weights). Sums run in a fixed order, without atomics or scatter.

Shape suffixes: N tokens, E width, F features, C codes; a table of M rows of D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .reference import accumulator

# Longest run of codes that is summed sequentially.
PIECE = 256


def segments(offsets: Tensor) -> Tensor:
    """Return the number of the segment that holds each entry, int64 [C]."""
    every = torch.arange(len(offsets) - 1, device=offsets.device)
    return every.repeat_interleave(offsets.diff())


def segment_sum(values_C: Tensor, offsets: Tensor) -> Tensor:
    """Sum each segment in float64, since frequent features have long sequential sums."""
    return torch.segment_reduce(values_C.double(), "sum", offsets=offsets)


def gather_sum(table_MD: Tensor, index_C: Tensor, offsets: Tensor, scale_C: Tensor) -> Tensor:
    """Return ``out_r = Σ_{c in segment r} scale_c · table[index_c]``, in the accumulator's dtype.

    Segments longer than PIECE (features that fire on most tokens) are summed in pieces, then the
    pieces in order, since rounding errors grow with the length of a sum.
    """
    acc = accumulator(table_MD.dtype)
    if index_C.numel() == 0 or table_MD.numel() == 0:
        return table_MD.new_zeros(len(offsets) - 1, table_MD.shape[1], dtype=acc)
    table_MD, index_C, scale_C = table_MD.to(acc).contiguous(), index_C.long(), scale_C.to(acc)
    counts = offsets.diff()
    hot = (counts > PIECE).nonzero().flatten()
    if len(hot) == 0:
        return _bags(table_MD, index_C, offsets, scale_C)
    in_hot_C = (counts > PIECE).repeat_interleave(counts)
    short = counts.masked_fill(counts > PIECE, 0)
    out = _bags(table_MD, index_C[~in_hot_C], _offsets(short), scale_C[~in_hot_C])
    pieces_H = (counts[hot] + PIECE - 1) // PIECE
    lengths = torch.full((int(pieces_H.sum()),), PIECE, device=offsets.device)
    lengths[pieces_H.cumsum(0) - 1] -= pieces_H * PIECE - counts[hot]  # each segment's last piece
    pieces = _bags(table_MD, index_C[in_hot_C], _offsets(lengths), scale_C[in_hot_C])
    every = torch.arange(len(lengths), device=offsets.device)
    out[hot] = _bags(pieces, every, _offsets(pieces_H), pieces.new_ones(len(lengths)))
    return out


def _offsets(lengths: Tensor) -> Tensor:
    return nnf.pad(lengths.cumsum(0), (1, 0))


def _bags(table_MD: Tensor, index_C: Tensor, offsets: Tensor, scale_C: Tensor) -> Tensor:
    return torch.embedding_bag(
        table_MD, index_C, offsets, mode=0, per_sample_weights=scale_C, include_last_offset=True
    )[0]


def decode_dense(
    a_NF: Tensor, W_dec_FE: Tensor, b_dec_E: Tensor, residual_NE: Tensor | None
) -> Tensor:
    """Return ``residual + W_decᵀ a + b_dec`` by a dense product."""
    if residual_NE is None:
        return torch.addmm(b_dec_E, a_NF, W_dec_FE)
    return torch.addmm(residual_NE, a_NF, W_dec_FE).add_(b_dec_E)


def sampled_product(
    g_NE: Tensor, W_FE: Tensor, rows_C: Tensor, features_C: Tensor, row_offsets: Tensor
) -> Tensor:
    """Return ``g[row_c] · W[feature_c]`` for every code, in the accumulator's dtype.

    Codes are sorted by row; those of row n are ``row_offsets[n]`` to ``row_offsets[n + 1] - 1``.
    """
    acc = accumulator(W_FE.dtype)
    if rows_C.numel() == 0 or W_FE.numel() == 0:
        return W_FE.new_zeros(len(rows_C), dtype=acc)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_NE.to(acc).contiguous(),
        W_FE.to(acc).contiguous(),
        features_C.long(),
        row_offsets,
        rows_C,
        0,
    )


def norms(W_dec_FE: Tensor) -> Tensor:
    """Return ``‖W_dec,i‖₂`` [F] in the accumulator's dtype."""
    return torch.linalg.vector_norm(W_dec_FE, dim=-1, dtype=accumulator(W_dec_FE.dtype))
