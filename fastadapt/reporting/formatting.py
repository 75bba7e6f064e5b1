"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """A number as a reader wants it: `digits` significant digits, thousands grouped, – for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 5 and not isinstance(value, int):
        return f"{value:,.0f}"
    if magnitude < -4:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def percent(value: float | None) -> str:
    """A share of 1 as a percentage with one digit, – for none."""
    return "–" if value is None else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds, the two largest that apply."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def markers_note(n: int, of: int) -> str:
    """Say that conversations have chat markers in their text.

    Example:
        >>> markers_note(2, 1000)[:60]
        '2 of 1,000 conversations have markers of the family in their'
    """
    return (
        f"{n:,} of {of:,} conversations have markers of the family in their text, which the "
        "tokenizer reads as markers"
    )
