"""Select the k largest positive entries on a GPU, exactly, by radix selection.

The bits of a positive float, read as an integer key, keep its order. Keys are processed in digits
of 8 bits, from the most significant. Each row's entries are counted by digit. Counts summed over a
group give the digit of the k-th largest key. After the last digit, the key of the k-th largest
entry and the number of equal entries to keep are known.

- :func:`keep_largest_of_tokens_` (topk): a token is ranked by one program, in one launch.
- :func:`keep_largest_` (batch_topk): the tokens of a row of x are ranked together.

Shape suffixes: N tokens, G groups of tokens that are ranked together, F features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_bits import order_key, pack, rank, unpack

DIGIT = tl.constexpr(8)  # bits
DIGITS = tl.constexpr(256)
COUNT: dict[str, Any] = {"BLOCK_W": 64, "num_warps": 4}
CUT: dict[str, Any] = {"BLOCK_W": 64, "num_warps": 4}
SELECT: dict[str, Any] = {"BLOCK_W": 32, "num_warps": 4}


@triton.jit
def _keys(
    words_ptr, values_ptr, row, f0, F, KEY_BITS: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """(flags, keys, values) [BLOCK_W, 32] of a row's features from f0; unflagged keys are 0."""
    W = (F + 31) // 32
    word = f0 // 32 + tl.arange(0, BLOCK_W)
    flags = unpack(tl.load(words_ptr + row * W + word, mask=word < W, other=0))
    features = f0 + (tl.arange(0, BLOCK_W) * 32)[:, None] + tl.arange(0, 32)[None, :]
    values = tl.load(values_ptr + row * F + features, mask=flags != 0, other=0.0)
    return flags, tl.where(flags != 0, order_key(values, KEY_BITS), 0), values


@triton.jit
def _count_row(
    words_ptr, values_ptr, row, prefix, shift, F, KEY_BITS: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Number of a row's keys by their digit at `shift`, of the keys that begin with `prefix`."""
    counts = tl.zeros((DIGITS,), dtype=tl.int32)
    for f0 in tl.range(0, F, BLOCK_W * 32):
        flags, keys, _ = _keys(words_ptr, values_ptr, row, f0, F, KEY_BITS, BLOCK_W)
        leading = (keys >> shift) >> DIGIT
        digit = (keys >> shift) & (DIGITS - 1)
        live = (flags != 0) & (leading == prefix)
        counts += tl.histogram(
            tl.reshape(digit, [BLOCK_W * 32]), DIGITS, mask=tl.reshape(live, [BLOCK_W * 32])
        )
    return counts


@triton.jit
def _cut_row(
    words_ptr, values_ptr, row, cut, quota, F, KEY_BITS: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Clear a row's flags below the cut, and those equal to it beyond the quota.

    Returns the smallest remaining value.
    """
    W = (F + 31) // 32
    equal_before = 0
    smallest = tl.full((BLOCK_W, 32), float("inf"), dtype=tl.float32)
    for f0 in tl.range(0, F, BLOCK_W * 32):
        flags, keys, values = _keys(words_ptr, values_ptr, row, f0, F, KEY_BITS, BLOCK_W)
        equal = ((flags != 0) & (keys == cut)).to(tl.int32)
        before = equal_before + rank(pack(equal))
        keep = (flags != 0) & ((keys > cut) | ((equal != 0) & (before < quota)))
        word = f0 // 32 + tl.arange(0, BLOCK_W)
        tl.store(words_ptr + row * W + word, pack(keep.to(tl.int32)), mask=word < W)
        smallest = tl.minimum(smallest, tl.where(keep, values.to(tl.float32), float("inf")))
        equal_before += tl.sum(tl.sum(equal, axis=1), axis=0)
    return tl.min(tl.min(smallest, axis=1), axis=0)


@triton.jit(do_not_specialize=["group_size", "shift"])
def count_digits(
    words_ptr, values_ptr, prefix_ptr, counts_ptr, F, group_size, shift,
    KEY_BITS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Count the next digits of a row's keys that begin with the group's prefix."""
    row = tl.program_id(0).to(tl.int64)
    prefix = tl.load(prefix_ptr + row // group_size)
    counts = _count_row(words_ptr, values_ptr, row, prefix, shift, F, KEY_BITS, BLOCK_W)
    tl.store(counts_ptr + row * DIGITS + tl.arange(0, DIGITS), counts)


@triton.jit(do_not_specialize=["group_size"])
def cut_rows(
    words_ptr, values_ptr, cut_ptr, quota_ptr, smallest_ptr, F, group_size,
    KEY_BITS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Clear each row's flags below its group's cut; write the smallest remaining value."""
    row = tl.program_id(0).to(tl.int64)
    cut = tl.load(cut_ptr + row // group_size)
    quota = tl.load(quota_ptr + row)
    smallest = _cut_row(words_ptr, values_ptr, row, cut, quota, F, KEY_BITS, BLOCK_W)
    tl.store(smallest_ptr + row, smallest)


@triton.jit(do_not_specialize=["k"])
def select_rows(
    words_ptr, values_ptr, F, k, KEY_BITS: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Clear the flags of all but the k largest values of each row; k > 0."""
    row = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, DIGITS)
    cut = tl.zeros((), dtype=tl.int32)
    left = k
    for n in tl.static_range(KEY_BITS // DIGIT):
        shift = KEY_BITS - DIGIT * (n + 1)
        counts = _count_row(words_ptr, values_ptr, row, cut, shift, F, KEY_BITS, BLOCK_W)
        # The digit of the k-th largest key; 0 if the row has fewer keys, so that all remain.
        above = tl.cumsum(counts, 0, reverse=True)
        digit = tl.max(tl.where(above >= left, digits, 0), axis=0)
        left -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        cut = (cut << DIGIT) | digit
    _cut_row(words_ptr, values_ptr, row, cut, left, F, KEY_BITS, BLOCK_W)


def keep_largest_of_tokens_(words: Tensor, values_NF: Tensor, k: int) -> None:
    """Clear the flags of all but each token's `k` largest entries, in place.

    Of equal entries, the lowest feature ranks first. NaN ranks above all numbers. `words` and
    `values_NF` are as in :func:`keep_largest_`.
    """
    N, F = values_NF.shape
    if k == 0:
        words.zero_()
    elif k < F and N:
        key_bits = 8 * values_NF.element_size()
        select_rows[(N,)](words, values_NF, F, k, KEY_BITS=key_bits, **SELECT)


def keep_largest_(words: Tensor, values_NF: Tensor, count_G: Tensor) -> Tensor:
    """Clear the flags of all but each group's `count_G` largest entries, in place.

    Of equal entries, the lowest (token, feature) ranks first. NaN ranks above all numbers.

    Args:
        words: flags of the positive entries, one bit each, int32 [N, ceil(F / 32)].
        values_NF: values of the flagged entries. Group g of G consists of the tokens from
            g * N / G to (g + 1) * N / G.
        count_G: entries to keep per group, int64, on the device.

    Returns:
        fp32 [N]: each token's smallest remaining value, infinite if none remains.
    """
    N, F = values_NF.shape
    G = len(count_G)
    smallest_N = values_NF.new_full((N,), torch.inf, dtype=torch.float32)
    if values_NF.numel() == 0:
        return smallest_N
    key_bits = 8 * values_NF.element_size()
    size = N // G
    prefix_G = words.new_zeros(G)
    counts_N = words.new_empty(N, DIGITS.value)
    left_G = count_G
    digit_G = count_G
    for shift in range(key_bits - DIGIT.value, -1, -DIGIT.value):
        count_digits[(N,)](
            words, values_NF, prefix_G, counts_N, F, size, shift, KEY_BITS=key_bits, **COUNT
        )
        # From the largest digit downwards: entries with this digit or a larger one.
        above_GH = counts_N.view(G, size, -1).sum(1).flip(1).cumsum(1)
        last = DIGITS.value - 1
        # If a group has fewer than `count` entries, its cut becomes 0, below every key.
        full_G = (above_GH < left_G[:, None]).sum(1).clamp(max=last)
        taken_G = above_GH.gather(1, (full_G - 1).clamp(min=0)[:, None])[:, 0]
        left_G = left_G - torch.where(full_G > 0, taken_G, 0)
        digit_G = last - full_G
        prefix_G = ((prefix_G << DIGIT.value) | digit_G).int()
    # The counts of the last digit are those of keys equal to the cut; the first `left` remain.
    equal_GT = counts_N.view(G, size, -1).gather(2, digit_G.view(G, 1, 1).expand(G, size, 1))
    equal_GT = equal_GT[..., 0].long()
    quota_GT = (left_G[:, None] - (equal_GT.cumsum(1) - equal_GT)).clamp(min=0)
    cut_G = prefix_G.masked_fill(count_G == 0, 0x7FFFFFFF)  # a key that only NaN has
    cut_rows[(N,)](
        words,
        values_NF,
        cut_G,
        quota_GT.flatten(),
        smallest_N,
        F,
        size,
        KEY_BITS=key_bits,
        **CUT,
    )
    return smallest_N


def smallest_flagged(words: Tensor, values_NF: Tensor) -> Tensor:
    """Return each token's smallest flagged value, fp32 [N], infinite if none is flagged."""
    N, F = values_NF.shape
    smallest_N = values_NF.new_full((N,), torch.inf, dtype=torch.float32)
    if values_NF.numel():
        zero_N = words.new_zeros(N)  # a cut of 0, below every key, clears no flag
        key_bits = 8 * values_NF.element_size()
        cut_rows[(N,)](
            words, values_NF, zero_N, zero_N.long(), smallest_N, F, 1, KEY_BITS=key_bits, **CUT
        )
    return smallest_N
