"""Turn flags and values into codes on a GPU, and count them.

The codes of a token stand together, in ascending feature order; `order` lists them by feature::

    words [N, W]                    by feature [F], in blocks of 256 tokens: count_columns
      |  scan                         |  add_blocks, scan
      v                               v
    row_offsets [N + 1]             feature_offsets [F + 1]
      |  compact_rows                 |  order_codes
      v                               v
    values, features [C]            order, tokens [C]

Every place is a prefix sum of exact counts, so the result does not depend on the order of programs,
and nothing is sorted. Codes beyond the capacity are not written, and offsets are clamped to the
capacity. The caller has the exact number of codes. With the library's product, encoding takes seven
launches. `scan` has two programs and `add_blocks` F / 128; the others have thousands.

Shape suffixes: N tokens, F features, W words of 32 features, C codes, B blocks of tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import GPU_PIECE, Codes
from .reference import TranscoderStats
from .triton_bits import popcount, unpack
from .triton_encode import JUMPRELU, Activation, Flags, empty_flags, load_cut

COUNT: dict[str, Any] = {"BLOCK_W": 256, "num_warps": 2}
#: One warp per token: a lane takes the set bits of its words one by one.
COMPACT: dict[str, Any] = {"BLOCK_W": 128, "BLOCK_TAIL": 1024, "num_warps": 1}
SPREAD: dict[str, Any] = {"BLOCK_W": 64, "num_warps": 4}
COLUMNS: dict[str, Any] = {"BLOCK_N": 16, "BLOCK_W": 4, "num_warps": 4}
ORDER: dict[str, Any] = {"BLOCK_N": 16, "BLOCK_W": 2, "num_warps": 4}
BLOCKS: dict[str, Any] = {"BLOCK_F": 128, "num_warps": 4}
SCAN: dict[str, Any] = {"BLOCK": 1024, "num_warps": 8}
#: Tokens of a block, whose flags are counted by feature.
BLOCK_TOKENS = 256


@triton.jit
def count_rows(words_ptr, before_ptr, counts_ptr, W, BLOCK_W: tl.constexpr):
    """Count the set flags of each row of words, and those before each word."""
    row = tl.program_id(0).to(tl.int64)
    total = 0
    for w0 in tl.range(0, W, BLOCK_W):
        word = w0 + tl.arange(0, BLOCK_W)
        counts = popcount(tl.load(words_ptr + row * W + word, mask=word < W, other=0))
        before = total + tl.cumsum(counts, 0) - counts
        tl.store(before_ptr + row * W + word, before, mask=word < W)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + row, total)


@triton.jit(do_not_specialize=["N"])
def count_columns(
    words_ptr, values_ptr, weights_ptr, blocks_ptr, counted_ptr, N, F, TOKENS,
    HAS_WEIGHTS: tl.constexpr, SKIP_ZEROS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Count each column's flags over TOKENS rows: all of them, and those that statistics count.

    Statistics leave out rows of weight 0, and with SKIP_ZEROS values of 0. Without either, only
    the first number is written.
    """
    first_word = tl.program_id(0).to(tl.int64) * BLOCK_W
    block = tl.program_id(1).to(tl.int64)
    word = first_word + tl.arange(0, BLOCK_W)
    W = (F + 31) // 32
    lanes = tl.arange(0, 32)
    features = first_word * 32 + (tl.arange(0, BLOCK_W) * 32)[:, None] + lanes[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_W, 32), dtype=tl.int32)
    counted = tl.zeros((BLOCK_N, BLOCK_W, 32), dtype=tl.int32)
    for n0 in tl.range(0, TOKENS, BLOCK_N):
        rows = block * TOKENS + n0 + tl.arange(0, BLOCK_N)
        words = tl.load(
            words_ptr + rows[:, None] * W + word[None, :],
            mask=(rows < N)[:, None] & (word < W)[None, :],
            other=0,
        )
        flags = (words[:, :, None] >> lanes[None, None, :]) & 1
        total += flags
        if HAS_WEIGHTS:
            weights = tl.load(weights_ptr + rows, mask=rows < N, other=0)
            flags = tl.where((weights != 0)[:, None, None], flags, 0)
        if SKIP_ZEROS:
            place = rows[:, None, None] * F + features[None, :, :]
            value = tl.load(values_ptr + place, mask=flags != 0, other=0.0)
            flags = tl.where(value == 0, 0, flags)
        counted += flags
    index = block * F + features
    tl.store(blocks_ptr + index, tl.sum(total, axis=0), mask=features < F)
    if HAS_WEIGHTS or SKIP_ZEROS:
        tl.store(counted_ptr + index, tl.sum(counted, axis=0), mask=features < F)


@triton.jit(do_not_specialize=["B"])
def add_blocks(
    blocks_ptr, counted_ptr, totals_ptr, feature_counts_ptr, F, B, COUNTED: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Replace each block's count by the sum of earlier blocks; write the features' totals."""
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_F,), dtype=tl.int32)
    counted = tl.zeros((BLOCK_F,), dtype=tl.int32)
    index = f
    for _ in tl.range(0, B):
        count = tl.load(blocks_ptr + index, mask=f < F, other=0)
        tl.store(blocks_ptr + index, total, mask=f < F)
        total += count
        if COUNTED:
            counted += tl.load(counted_ptr + index, mask=f < F, other=0)
        index += F
    tl.store(totals_ptr + f, total, mask=f < F)
    tl.store(feature_counts_ptr + f, (counted if COUNTED else total).to(tl.int64), mask=f < F)


@triton.jit(do_not_specialize=["N", "capacity"])
def scan(
    counts_ptr, totals_ptr, feature_counts_ptr, weights_ptr, padding_ptr, row_offsets_ptr,
    feature_offsets_ptr, piece_offsets_ptr, n_codes_ptr, n_active_ptr, n_tokens_ptr,
    min_active_ptr, N, F, capacity, HAS_WEIGHTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    ORDERED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write offsets and sums: one program for tokens, one for features."""
    inside = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        codes = tl.zeros((), dtype=tl.int64)
        tokens = tl.zeros((BLOCK,), dtype=tl.int64)
        for n0 in tl.range(0, N, BLOCK):
            n = n0 + inside
            count = tl.load(counts_ptr + n, mask=n < N, other=0).to(tl.int64)
            offset = codes + tl.cumsum(count, 0)
            tl.store(row_offsets_ptr + n + 1, tl.minimum(offset, capacity), mask=n < N)
            codes += tl.sum(count, axis=0)
            is_counted = n < N
            if HAS_WEIGHTS:
                is_counted = is_counted & (tl.load(weights_ptr + n, mask=n < N, other=0) != 0)
            if HAS_PADDING:
                is_counted = is_counted & (tl.load(padding_ptr + n, mask=n < N, other=1) == 0)
            tokens += is_counted.to(tl.int64)
        tl.store(row_offsets_ptr, tl.zeros((), dtype=tl.int64))
        tl.store(n_codes_ptr, codes)
        tl.store(n_tokens_ptr, tl.sum(tokens, axis=0))
        tl.store(min_active_ptr, -1.0)
    else:
        active = tl.zeros((BLOCK,), dtype=tl.int64)
        before = tl.zeros((), dtype=tl.int64)
        pieces = tl.zeros((), dtype=tl.int32)
        for f0 in tl.range(0, F, BLOCK):
            f = f0 + inside
            active += tl.load(feature_counts_ptr + f, mask=f < F, other=0)
            if ORDERED:
                count = tl.load(totals_ptr + f, mask=f < F, other=0).to(tl.int64)
                end = before + tl.cumsum(count, 0)
                start = tl.minimum(end - count, capacity)
                before += tl.sum(count, axis=0)
                end = tl.minimum(end, capacity)
                tl.store(feature_offsets_ptr + f + 1, end, mask=f < F)
                # A program sums the first PIECE codes of a feature; further ones are pieces.
                further = tl.maximum((end - start + (PIECE - 1)) // PIECE - 1, 0).to(tl.int32)
                tl.store(piece_offsets_ptr + f + 1, pieces + tl.cumsum(further, 0), mask=f < F)
                pieces += tl.sum(further, axis=0)
        tl.store(n_active_ptr, tl.sum(active, axis=0))
        if ORDERED:
            tl.store(feature_offsets_ptr, tl.zeros((), dtype=tl.int64))
            tl.store(piece_offsets_ptr, 0)


@triton.jit(do_not_specialize=["N", "capacity"])
def compact_rows(
    words_ptr, before_ptr, dense_ptr, row_offsets_ptr, values_ptr, features_ptr, order_ptr,
    tokens_ptr, N, F, capacity, ORDERED: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write each row's codes at the row's offset; further programs fill the unused tail."""
    row = tl.program_id(0).to(tl.int64)
    if row < N:
        start = tl.load(row_offsets_ptr + row)
        end = tl.load(row_offsets_ptr + row + 1)
        W = (F + 31) // 32
        for w0 in tl.range(0, W, BLOCK_W):
            word = w0 + tl.arange(0, BLOCK_W)
            index = row * W + word
            words = tl.load(words_ptr + index, mask=word < W, other=0)
            place = start + tl.load(before_ptr + index, mask=word < W, other=0)
            for _ in tl.range(0, tl.max(popcount(words), axis=0)):
                live = (words != 0) & (place < end)
                lowest = words & -words
                feature = word * 32 + popcount(lowest - 1)
                value = tl.load(dense_ptr + row * F + feature, mask=live, other=0.0)
                tl.store(values_ptr + place, value, mask=live)
                tl.store(features_ptr + place, feature, mask=live)
                words = words & (words - 1)
                place += 1
    else:
        place = (row - N) * BLOCK_TAIL + tl.arange(0, BLOCK_TAIL)
        unused = (place >= tl.load(row_offsets_ptr + N)) & (place < capacity)
        nothing = tl.zeros((BLOCK_TAIL,), dtype=tl.int32)
        tl.store(values_ptr + place, nothing.to(values_ptr.dtype.element_ty), mask=unused)
        tl.store(features_ptr + place, nothing + F, mask=unused)
        if ORDERED:
            tl.store(order_ptr + place, place, mask=unused)
            tl.store(tokens_ptr + place, nothing, mask=unused)


@triton.jit(do_not_specialize=["N", "capacity"])
def order_codes(
    words_ptr, before_ptr, row_offsets_ptr, blocks_ptr, feature_offsets_ptr, order_ptr, tokens_ptr,
    N, F, capacity, TOKENS, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write the codes of TOKENS rows in feature order: their index, and their token."""
    first_word = tl.program_id(0).to(tl.int64) * BLOCK_W
    block = tl.program_id(1).to(tl.int64)
    word = first_word + tl.arange(0, BLOCK_W)
    W = (F + 31) // 32
    lanes = tl.arange(0, 32)
    features = first_word * 32 + (tl.arange(0, BLOCK_W) * 32)[:, None] + lanes[None, :]
    place = tl.load(feature_offsets_ptr + features, mask=features < F, other=0)
    place += tl.load(blocks_ptr + block * F + features, mask=features < F, other=0)
    for n0 in tl.range(0, TOKENS, BLOCK_N):
        rows = block * TOKENS + n0 + tl.arange(0, BLOCK_N)
        index = rows[:, None] * W + word[None, :]
        live = (rows < N)[:, None] & (word < W)[None, :]
        words = tl.load(words_ptr + index, mask=live, other=0)
        first = tl.load(row_offsets_ptr + rows, mask=rows < N, other=0)[:, None]
        first += tl.load(before_ptr + index, mask=live, other=0)
        flags = (words[:, :, None] >> lanes[None, None, :]) & 1
        target = place[None, :, :] + (tl.cumsum(flags, 0) - flags)
        below = words[:, :, None] & ((1 << lanes) - 1)[None, None, :]
        # Beyond the capacity, results are invalid, but every index stays one of a code.
        code = tl.minimum(first[:, :, None] + popcount(below), capacity - 1)
        keep = (flags != 0) & (target < capacity)
        tl.store(order_ptr + target, code, mask=keep)
        tl.store(tokens_ptr + target, (rows[:, None, None] + tl.zeros_like(flags)).to(tl.int32),
                 mask=keep)  # fmt: skip
        place += tl.sum(flags, axis=0)


@triton.jit
def spread_rows(
    words_ptr, values_ptr, cut_ptr, window_ptr, F, half_bandwidth, ACTIVATION: tl.constexpr,
    CUT_STRIDE: tl.constexpr, BLOCK_W: tl.constexpr,
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
        cut = load_cut(cut_ptr, features, features < F, CUT_STRIDE)
        near = tl.abs(value.to(tl.float32) - cut) < half_bandwidth
        window = flags & (near | (value == 0))
        tl.store(window_ptr + place, window.to(tl.int8), mask=features < F)


def count_flags(words: Tensor) -> Flags:
    """Return `words` with the numbers of their flags."""
    flags = empty_flags(words)
    N, W = words.shape
    if N:
        count_rows[(N,)](*flags, W, **COUNT)
    return flags


def encode_flags(
    flags: Flags,
    values_NF: Tensor,
    weight_N: Tensor | None,
    activation: Activation,
    capacity: int,
    *,
    dense: bool,
    ordered: bool,
) -> tuple[Codes, TranscoderStats]:
    """Return the flagged entries in buffers of length `capacity`, and their statistics.

    Args:
        flags: flags of the codes and their numbers; `before` is not read with `dense`.
        values_NF: values at the flags.
        weight_N: weights of tokens, on the device; statistics leave out those of weight 0.
        activation: the activation; entries of value 0 are no activity for jumprelu.
        capacity: length of the buffers. The unused tail has values 0 and features F.
        dense: return statistics only; the codes are empty.
        ordered: include the feature order, which gradients of the weights need.
    """
    N, F = values_NF.shape
    words = flags.words
    n_blocks = triton.cdiv(N, BLOCK_TOKENS)
    ordered, capacity = ordered and not dense, 0 if dense else capacity
    is_counted = weight_N is not None or activation.jumps
    blocks = words.new_empty(n_blocks, F)
    counted = words.new_empty((n_blocks, F) if is_counted else 0)
    totals_F = words.new_empty(F)
    counts_F = words.new_empty(F, dtype=torch.int64)
    if values_NF.numel():
        grid = triton.cdiv(words.shape[1], COLUMNS["BLOCK_W"]), n_blocks
        count_columns[grid](
            words,
            values_NF,
            weight_N,
            blocks,
            counted,
            N,
            F,
            BLOCK_TOKENS,
            HAS_WEIGHTS=weight_N is not None,
            SKIP_ZEROS=activation.jumps,
            **COLUMNS,
        )
    if F:
        add_blocks[(triton.cdiv(F, BLOCKS["BLOCK_F"]),)](
            blocks, counted, totals_F, counts_F, F, n_blocks, COUNTED=is_counted, **BLOCKS
        )
    row_offsets = words.new_empty(N + 1, dtype=torch.int64)
    feature_offsets = words.new_empty(F + 1 if ordered else 0, dtype=torch.int64)
    piece_offsets = words.new_empty(F + 1 if ordered else 0)
    n_codes, n_active, n_tokens = (words.new_empty((), dtype=torch.int64) for _ in range(3))
    min_active = words.new_empty((), dtype=torch.float32)
    scan[(2,)](
        flags.counts,
        totals_F,
        counts_F,
        weight_N,
        activation.padding_N,
        row_offsets,
        feature_offsets,
        piece_offsets,
        n_codes,
        n_active,
        n_tokens,
        min_active,
        N,
        F,
        capacity,
        HAS_WEIGHTS=weight_N is not None,
        HAS_PADDING=activation.padding_N is not None,
        ORDERED=ordered,
        PIECE=GPU_PIECE,
        **SCAN,
    )
    values = values_NF.new_empty(capacity)
    features = words.new_empty(capacity)
    order = words.new_empty(capacity if ordered else 0, dtype=torch.int64)
    tokens = words.new_empty(capacity if ordered else 0)
    if capacity:
        compact_rows[(N + triton.cdiv(capacity, COMPACT["BLOCK_TAIL"]),)](
            words,
            flags.before,
            values_NF,
            row_offsets,
            values,
            features,
            order,
            tokens,
            N,
            F,
            capacity,
            ORDERED=ordered,
            **COMPACT,
        )
    if ordered and capacity and values_NF.numel():
        order_codes[(triton.cdiv(words.shape[1], ORDER["BLOCK_W"]), n_blocks)](
            words,
            flags.before,
            row_offsets,
            blocks,
            feature_offsets,
            order,
            tokens,
            N,
            F,
            capacity,
            BLOCK_TOKENS,
            **ORDER,
        )
    window = words.new_empty(0, dtype=torch.bool)
    codes = Codes(
        values, features, row_offsets, order, tokens, feature_offsets, piece_offsets, window
    )
    return codes, TranscoderStats(n_active, counts_F, n_tokens, min_active, n_codes)


def spread_(words: Tensor, values_NF: Tensor, activation: Activation) -> Tensor:
    """Zero values without a flag in place; return jumprelu's window [N, F], else [0]."""
    N, F = values_NF.shape
    window = values_NF.new_empty((N, F) if activation.jumps else 0, dtype=torch.bool)
    if values_NF.numel():
        spread_rows[(N, triton.cdiv(words.shape[1], SPREAD["BLOCK_W"]))](
            words,
            values_NF,
            activation.threshold_F,
            window.view(torch.uint8),
            F,
            activation.half_bandwidth,
            **activation.cut,
            **SPREAD,
        )
    return window
