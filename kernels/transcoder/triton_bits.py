"""Device functions on words of 32 flags, and on floats as ordered keys. Imported by the kernels.

A tile of flags is ``[..., W, 32]``: bit j of word w stands for feature ``32 w + j``.

A device function returns at its end alone: Triton compiles also what follows a return that stands
under a constant condition.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(words):
    """Set bits of each 32-bit word, int32. Adds only: no product may reach an address."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v = v + (v >> 8)
    v = v + (v >> 16)
    return (v & 0x3F).to(tl.int32)


@triton.jit
def pack(flags):
    """int32 [W] words of [W, 32] flags, which are 0 or 1."""
    return tl.sum(flags << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def pack_rows(flags):
    """int32 [N, W] words of [N, W, 32] flags."""
    return tl.sum(flags << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def unpack(words):
    """int32 [W, 32] flags of [W] words."""
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def rank(words):
    """int32 [W, 32]: how many set bits of the [W] words come before each place."""
    counts = popcount(words)
    before = tl.cumsum(counts, 0) - counts
    below = words[:, None] & ((1 << tl.arange(0, 32)) - 1)[None, :]
    return before[:, None] + popcount(below)


@triton.jit
def order_key(values, KEY_BITS: tl.constexpr):
    """int32 keys in the order of positive `values` (16 or 32 bits); every NaN is the largest."""
    if KEY_BITS == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        largest = 0x7FFF
    else:
        bits = values.to(tl.int32, bitcast=True)
        largest = 0x7FFFFFFF
    return tl.where(values != values, largest, bits)
