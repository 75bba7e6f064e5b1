"""SplitMix64, a hash of integers: the same bits on every device (Steele et al., OOPSLA 2014)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

#: 2**64 over the golden ratio, as int64: what SplitMix64 adds to its state for each number.
STEP = 0x9E3779B97F4A7C15 - 2**64

_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_Number = TypeVar("_Number", int, Tensor)


def mix(x: _Number) -> _Number:
    """Return SplitMix64's finaliser of ``x``: an int64 tensor, or an integer of any size.

    Of an integer only the low 64 bits of the result count: mask them.

    Example:
        >>> hex(mix(1) & (2**64 - 1))
        '0x5692161d100b05e5'
    """
    for shift, factor in _ROUNDS:
        # The mask makes the shift a logical one: int64 and Python's integers extend the sign.
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
