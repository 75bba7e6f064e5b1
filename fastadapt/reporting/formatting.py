"""Formats numbers, percentages and durations for people."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits and grouped thousands; ``–`` for no value.

    Example:
        >>> number(1234.5678), number(0.00012), number(2e-7), number(12_345), number(None)
        ('1,235', '0.000120', '2.0e-7', '12,345', '–')
    """
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
    """Format a share of 1 as a percentage with one decimal digit; ``–`` for None.

    Example:
        >>> percent(0.1234)
        '12.3%'
    """
    return "–" if value is None else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """Format seconds as hours and minutes, minutes and seconds, or seconds; ``–`` for None.

    Example:
        >>> duration(4000), duration(75.2)
        ('1 h 6 min', '1 min 15 s')
    """
    if seconds is None:
        return "–"
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {remainder} s" if minutes else f"{remainder} s"


def markers_note(n: int, total: int) -> str:
    """Return a note on the number of texts whose turns contain special tokens.

    Example:
        >>> markers_note(2, 1000)
        '2 of 1,000 texts have special tokens in what was said (data.markers)'
    """
    return f"{n:,} of {total:,} texts have special tokens in what was said (data.markers)"
