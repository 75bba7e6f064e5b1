"""Device functions on words of 32 flags and on floats as ordered keys, for the kernels.

A tile of flags has the shape ``[W, 32]``: bit j of word w is the flag of feature ``32 w + j``.

Device functions return only at their end: Triton also compiles the code after a return under a
constant condition.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words):
    """Number of set bits of each 32-bit word, int32.

    The function only shifts and adds: the count enters addresses, which may contain no 32-bit
    product.
    """
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v = v + (v >> 8)
    v = v + (v >> 16)
    return (v & 0x3F).to(tl.int32)


@triton.jit
def pack(flags):
    """Pack [W, 32] flags, 0 or 1, into int32 [W] words."""
    return tl.sum(flags << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def unpack(words):
    """Unpack [W] words into int32 [W, 32] flags."""
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def _descend(counts, place, n, SIZE: tl.constexpr):
    """Go to the upper SIZE bits from `place` if the lower ones, with `counts` set, end before n.

    Returns the new place, and n less the set bits that were passed.
    """
    below = (counts >> place) & (2 * SIZE - 1)
    beyond = n >= below
    return tl.where(beyond, place + SIZE, place), tl.where(beyond, n - below, n)


@triton.jit
def nth_set_bit(words, n):
    """Place of the n-th set bit, from 0, of each word, int32; arbitrary without such a bit."""
    # Numbers of set bits, in fields of 2, 4, 8 and 16 bits.
    in_2 = words - ((words >> 1) & 0x55555555)
    in_4 = (in_2 & 0x33333333) + ((in_2 >> 2) & 0x33333333)
    in_8 = (in_4 + (in_4 >> 4)) & 0x0F0F0F0F
    in_16 = in_8 + (in_8 >> 8)
    place, n = _descend(in_16, tl.zeros_like(words), n, 16)
    place, n = _descend(in_8, place, n, 8)
    place, n = _descend(in_4, place, n, 4)
    place, n = _descend(in_2, place, n, 2)
    place, n = _descend(words, place, n, 1)
    return place


@triton.jit
def rank(words):
    """Number of set bits of the [W] words before each bit, int32 [W, 32]."""
    counts = popcount(words)
    before = tl.cumsum(counts, 0) - counts
    below = words[:, None] & ((1 << tl.arange(0, 32)) - 1)[None, :]
    return before[:, None] + popcount(below)


@triton.jit
def order_key(values, KEY_BITS: tl.constexpr):
    """int32 keys that order positive `values` of 16 or 32 bits; NaN gets the largest key."""
    if KEY_BITS == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        largest = 0x7FFF
    else:
        bits = values.to(tl.int32, bitcast=True)
        largest = 0x7FFFFFFF
    return tl.where(values != values, largest, bits)
