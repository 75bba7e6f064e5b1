"""Decode on a GPU straight from flags and values, without codes::

    words, values [N, F]  --decode_words-->  out [N, E]

A program computes a slice of columns of one token. It scans the token's words, and sums the rows of
W_dec of the flagged features in ascending order, a few at a time. Nothing is compacted, so nothing
can overflow. The result of a token depends on no other token. The kernel is meant for few tokens:
each slice scans all words of its token, 1 kB for 8,192 features.

Shape suffixes: N tokens, E width, F features, W words of 32 features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_bits import nth_set_bit, popcount
from .triton_encode import last_contiguous

#: One warp per slice: its lanes hold the columns, and all lanes know the features to sum.
DECODE: dict[str, Any] = {"BLOCK_W": 256, "BLOCK_C": 8, "BLOCK_E": 256, "num_warps": 1}


@triton.jit
def decode_flagged(
    words_ptr, values_ptr, table_ptr, bias_ptr, residual_ptr, out_ptr, F, E, table_stride,
    residual_stride, HAS_RESIDUAL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write ``residual_t + bias + Σ_f value_tf table[f]`` over the features f with a set bit."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = columns < E
    W = (F + 31) // 32
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for w0 in tl.range(0, W, BLOCK_W):
        word = w0 + tl.arange(0, BLOCK_W)
        words = tl.load(words_ptr + row * W + word, mask=word < W, other=0)
        counts = popcount(words)
        end = tl.cumsum(counts, 0)
        n_flags = tl.sum(counts, axis=0)
        for c0 in tl.range(0, n_flags, BLOCK_C):
            nth = c0 + tl.arange(0, BLOCK_C)
            live = nth < n_flags
            # The n-th flag is in the first word that ends beyond n.
            passed = end[None, :] <= nth[:, None]
            index = w0 + tl.sum(passed.to(tl.int32), axis=1)
            before = tl.max(tl.where(passed, end[None, :], 0), axis=1)
            bits = tl.load(words_ptr + row * W + index, mask=live, other=0)
            feature = (index * 32 + nth_set_bit(bits, nth - before)).to(tl.int64)
            value = tl.load(values_ptr + row * F + feature, mask=live, other=0.0)
            entries = tl.load(
                table_ptr + feature[:, None] * table_stride + columns[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(value.to(tl.float32)[:, None] * entries.to(tl.float32), axis=0)
    total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        total += residual.to(tl.float32)
    tl.store(out_ptr + row * E + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def decode_words(
    words: Tensor,
    values_NF: Tensor,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    residual_NE: Tensor | None,
) -> Tensor:
    """Return ``residual + W_decᵀ a + b_dec`` [N, E], reading only the active rows of W_dec.

    Args:
        words: flags of the active entries, one bit each, int32 [N, ceil(F / 32)].
        values_NF: the activations at the flags; other entries are not read.
        W_dec_FE, b_dec_E, residual_NE: as in the public function, of the dtype of `values_NF`.
    """
    (N, F), E = values_NF.shape, W_dec_FE.shape[1]
    W_dec_FE = last_contiguous(W_dec_FE)
    residual_NE = None if residual_NE is None else last_contiguous(residual_NE)
    out = W_dec_FE.new_empty(N, E)
    if out.numel():
        decode_flagged[(N, triton.cdiv(E, DECODE["BLOCK_E"]))](
            words,
            values_NF,
            W_dec_FE,
            b_dec_E.contiguous(),
            residual_NE,
            out,
            F,
            E,
            W_dec_FE.stride(0),
            0 if residual_NE is None else residual_NE.stride(0),
            HAS_RESIDUAL=residual_NE is not None,
            **DECODE,
        )
    return out
