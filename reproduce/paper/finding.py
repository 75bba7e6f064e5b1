"""A value with a verdict: what the page says of a claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastadapt.reporting.tables import Interval

Result = Mapping[str, Any]
NOT_MEASURABLE = "not measurable"


class Finding(NamedTuple):
    """What was measured, as text, and whether it agrees with the paper: yes, no, or why not."""

    value: str
    verdict: str


Measure = Callable[[Result], Finding | None]


def joined(verdicts: Sequence[str]) -> str:
    """Return the verdict of a claim about several values, which holds if it holds for each.

    Example:
        >>> joined(["yes", "yes, not clearly"]), joined(["yes", "no", "no"])
        ('yes, not clearly', 'no for 2 of 3')
    """
    if NOT_MEASURABLE in verdicts:
        return NOT_MEASURABLE
    if failed := [v for v in verdicts if v.startswith("no")]:
        clear = "" if "no" in failed else ", not clearly"
        return f"no for {len(failed)} of {len(verdicts)}{clear}" if verdicts[1:] else failed[0]
    return "yes" if set(verdicts) == {"yes"} else "yes, not clearly"


def meet(a: Interval, b: Interval) -> bool:
    """Return whether two intervals meet; ends that are not defined are those of the estimate."""
    low, high = (
        [float((i["mean"] if i[end] is None else i[end]) or 0) for i in (a, b)]
        for end in ("low", "high")
    )
    return max(low) <= min(high)
