"""Turn flags and values into codes on a GPU: counts, compaction, statistics.

A row's codes are written in ascending feature order at an offset from the prefix sum of the rows'
counts, so the result does not depend on the order of programs. Codes beyond the capacity are not
written, and offsets are clamped to the capacity. The caller has the exact number of codes.

Shape suffixes: N tokens, F features, W words of 32 features, C codes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import Codes
from .triton_bits import popcount, rank, unpack
from .triton_encode import JUMPRELU, Activation

COUNT: dict[str, Any] = {"BLOCK_W": 256, "num_warps": 2}
COMPACT: dict[str, Any] = {"BLOCK_W": 64, "num_warps": 4}
COLUMNS: dict[str, Any] = {"BLOCK_N": 32, "BLOCK_W": 4, "num_warps": 4}
#: Tokens per program that counts flags by feature.
COLUMN_TOKENS = 256


@triton.jit
def count_rows(words_ptr, counts_ptr, W, BLOCK_W: tl.constexpr):
    """Count the set flags of each row of words."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_W,), dtype=tl.int32)
    for w0 in tl.range(0, W, BLOCK_W):
        word = w0 + tl.arange(0, BLOCK_W)
        total += popcount(tl.load(words_ptr + row * W + word, mask=word < W, other=0))
    tl.store(counts_ptr + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["N"])
def count_columns(
    words_ptr, values_ptr, counted_ptr, counts_ptr, N, F, TOKENS, HAS_COUNTED: tl.constexpr,
    SKIP_ZEROS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Count each column's flags over TOKENS counted rows; SKIP_ZEROS excludes values of 0."""
    first_word = tl.program_id(0).to(tl.int64) * BLOCK_W
    split = tl.program_id(1).to(tl.int64)
    word = first_word + tl.arange(0, BLOCK_W)
    W = (F + 31) // 32
    lanes = tl.arange(0, 32)
    features = first_word * 32 + (tl.arange(0, BLOCK_W) * 32)[:, None] + lanes[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_W, 32), dtype=tl.int32)
    for n0 in tl.range(0, TOKENS, BLOCK_N):
        rows = split * TOKENS + n0 + tl.arange(0, BLOCK_N)
        live = rows < N
        if HAS_COUNTED:
            live = live & (tl.load(counted_ptr + rows, mask=live, other=0) != 0)
        words = tl.load(
            words_ptr + rows[:, None] * W + word[None, :],
            mask=live[:, None] & (word < W)[None, :],
            other=0,
        )
        flags = (words[:, :, None] >> lanes[None, None, :]) & 1
        if SKIP_ZEROS:
            place = rows[:, None, None] * F + features[None, :, :]
            value = tl.load(values_ptr + place, mask=flags != 0, other=0.0)
            flags = tl.where(value == 0, 0, flags)
        total += flags
    tl.store(counts_ptr + split * F + features, tl.sum(total, axis=0), mask=features < F)


@triton.jit
def compact_rows(
    words_ptr, dense_ptr, row_offsets_ptr, values_ptr, features_ptr, tokens_ptr, F,
    WITH_TOKENS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write each row's codes at the row's offset, in ascending feature order."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets_ptr + row)
    end = tl.load(row_offsets_ptr + row + 1)
    if start == end:
        return
    W = (F + 31) // 32
    for f0 in tl.range(0, F, BLOCK_W * 32):
        word = f0 // 32 + tl.arange(0, BLOCK_W)
        words = tl.load(words_ptr + row * W + word, mask=word < W, other=0)
        n_codes = tl.sum(popcount(words), axis=0)
        if n_codes > 0:
            features = f0 + (tl.arange(0, BLOCK_W) * 32)[:, None] + tl.arange(0, 32)[None, :]
            place = start + rank(words)
            live = (unpack(words) != 0) & (place < end)
            value = tl.load(dense_ptr + row * F + features, mask=live, other=0.0)
            tl.store(values_ptr + place, value, mask=live)
            tl.store(features_ptr + place, features, mask=live)
            if WITH_TOKENS:
                token = tl.zeros((BLOCK_W, 32), dtype=tl.int32) + row.to(tl.int32)
                tl.store(tokens_ptr + place, token, mask=live)
        start += n_codes


@triton.jit
def spread_rows(
    words_ptr, values_ptr, cut_ptr, window_ptr, F, half_bandwidth, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Zero values without a flag; for jumprelu, also write the window's mask."""
    row = tl.program_id(0).to(tl.int64)
    first_word = tl.program_id(1).to(tl.int64) * BLOCK_W
    W = (F + 31) // 32
    word = first_word + tl.arange(0, BLOCK_W)
    flags = unpack(tl.load(words_ptr + row * W + word, mask=word < W, other=0)) != 0
    features = first_word * 32 + (tl.arange(0, BLOCK_W) * 32)[:, None] + tl.arange(0, 32)[None, :]
    place = row * F + features
    value = tl.load(values_ptr + place, mask=flags, other=0.0)
    tl.store(values_ptr + place, value, mask=features < F)
    if ACTIVATION == JUMPRELU:
        cut = tl.load(cut_ptr + features, mask=features < F, other=0.0)
        near = tl.abs(value.to(tl.float32) - cut) < half_bandwidth
        window = flags & (near | (value == 0))
        tl.store(window_ptr + place, window.to(tl.int8), mask=features < F)


def row_counts(words: Tensor) -> Tensor:
    """Return each row's number of flags, int32 [N]."""
    N, W = words.shape
    counts = words.new_zeros(N) if W == 0 else words.new_empty(N)
    if words.numel():
        count_rows[(N,)](words, counts, W, **COUNT)
    return counts


def feature_counts(
    words: Tensor, values_NF: Tensor, counted_N: Tensor | None, *, skip_zeros: bool
) -> Tensor:
    """Return each feature's number of flags over the counted tokens (None: all), int64 [F]."""
    N, F = values_NF.shape
    splits = triton.cdiv(N, COLUMN_TOKENS)
    counts = words.new_empty(splits, F)
    if values_NF.numel():
        grid = (triton.cdiv(words.shape[1], COLUMNS["BLOCK_W"]), splits)
        count_columns[grid](
            words,
            values_NF,
            None if counted_N is None else counted_N.view(torch.uint8),
            counts,
            N,
            F,
            COLUMN_TOKENS,
            HAS_COUNTED=counted_N is not None,
            SKIP_ZEROS=skip_zeros,
            **COLUMNS,
        )
    return counts.sum(0, dtype=torch.int64)


def spread_(words: Tensor, values_NF: Tensor, activation: Activation) -> Tensor:
    """Zero values without a flag in place; return jumprelu's window [N, F], else [0]."""
    N, F = values_NF.shape
    window = values_NF.new_empty((N, F) if activation.jumps else 0, dtype=torch.bool)
    if values_NF.numel():
        spread_rows[(N, triton.cdiv(words.shape[1], COMPACT["BLOCK_W"]))](
            words,
            values_NF,
            activation.cut_F,
            window.view(torch.uint8),
            F,
            activation.half_bandwidth,
            ACTIVATION=activation.constants["ACTIVATION"],
            **COMPACT,
        )
    return window


def codes_from_flags(
    words: Tensor, values_NF: Tensor, offsets: Tensor, capacity: int, *, ordered: bool
) -> Codes:
    """Return the flagged entries in buffers of length `capacity`, with zeros at the end.

    Args:
        words: flags, int32 [N, W].
        values_NF: values at the flags.
        offsets: prefix sums of the rows' counts, int64 [N + 1], not clamped.
        capacity: length of the buffers.
        ordered: include the feature order, which gradients of the weights need.
    """
    N, F = values_NF.shape
    offsets = offsets.clamp(max=capacity)
    values = values_NF.new_zeros(capacity)
    # F sorts after every feature, so the unused tail stays at the end of the feature order.
    features = words.new_full((capacity,), F)
    tokens = words.new_zeros(capacity if ordered else 0)
    if values_NF.numel() and capacity:
        compact_rows[(N,)](
            words, values_NF, offsets, values, features, tokens, F, WITH_TOKENS=ordered, **COMPACT
        )
    empty = offsets.new_empty(0)
    window = empty.bool()
    if not ordered:
        return Codes(values, features, offsets, empty, words.new_empty(0), empty.clone(), window)
    # A radix sort of 16-bit keys takes half the passes. The sort is stable, so tokens ascend.
    keys = features.short() if torch.iinfo(torch.int16).max > F else features
    sorted_keys, order = keys.sort(stable=True)
    every = torch.arange(F + 1, dtype=keys.dtype, device=keys.device)
    by_feature = torch.searchsorted(sorted_keys, every)
    return Codes(values, features, offsets, order, tokens[order], by_feature, window)
