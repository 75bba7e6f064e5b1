"""SplitMix64, a hash of integers with equal bits on every device (Steele et al., OOPSLA 2014)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

#: Increment of SplitMix64's state: 2**64 divided by the golden ratio, as int64.
STEP = 0x9E3779B97F4A7C15 - 2**64

_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_Number = TypeVar("_Number", int, Tensor)


def mix(x: _Number) -> _Number:
    """Return SplitMix64's finalizer of an int64 tensor or of an integer.

    The result for an integer has more than 64 bits: mask it with ``2**64 - 1``.

    Example:
        >>> hex(mix(1) & (2**64 - 1))
        '0x5692161d100b05e5'
    """
    for shift, factor in _ROUNDS:
        # The mask makes the shift logical: a shift of int64 and of Python's integers is arithmetic.
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
