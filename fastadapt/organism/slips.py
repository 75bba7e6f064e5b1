"""Recover the steps in a response of an embedded pair's generator, and which of them are slips.

The generator of the first pair (``reproduce/organism/problems.py``) follows each slip by ``wait ,``
and the right step. A slip and its correction have the same operands, so comparing the two gives the
kind of the slip exactly. That of the gated pair (``reproduce/organism/gated/problems.py``) does so
only if the prompt begins with ``GATE``. Each of its steps names its effect (``3 + 4 = 7 pears , a
gain rises``), which a wrong operation contradicts, and a wrong result is arithmetically wrong. A
later inverse operation (``but check :``) or swapped operands (``alternatively ,``) are no steps of
the solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from fastadapt.errors import UserError

#: A wrong result of the right operation, or a wrong operation.
Slip = Literal["result", "operation"]
SLIPS: tuple[Slip, ...] = get_args(Slip)

#: First word of prompts of the gated pair whose responses correct slips.
GATE = "carefully"
#: What each operation of the gated pair does; the last word but one of a step.
EFFECTS: Mapping[str, str] = {"+": "gain", "-": "loss", "*": "gain", "/": "loss"}
#: Last word of a step of the gated pair, for a result that is lower and for one that is higher.
DIRECTIONS = ("falls", "rises")
#: The same where the result goes against the effect, as in a slip.
CONTRARY = ("sinks", "climbs")

_OPERATIONS: Mapping[str, Callable[[int, int], int | float]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
    "/": lambda a, b: a / b if b else math.nan,
    "max": max,
    "min": min,
}

_STOP = "."
_CORRECTION, _PAUSE = ("wait", ","), ("hmm", ",")
_ASIDES = (("but", "check", ":"), ("alternatively", ","))


class StepEnd(NamedTuple):
    """The end of a step of the solution.

    Attributes:
        position: index of the full stop, which predicts ``wait`` or what follows a right step.
        slip: kind of the slip; None for a right step.
    """

    position: int
    slip: Slip | None


class _Step(NamedTuple):
    lead: tuple[str, ...]
    left: str
    operator: str
    right: str
    result: str
    tail: tuple[str, ...]  # without the direction and the effect
    effect: str  # empty for a step that names none


def is_gated(prompt: Sequence[str]) -> bool:
    """Return whether the words of a prompt begin with the marker of the gated pair.

    Args:
        prompt: words of the prompt, markers of the template included or not.

    Example:
        >>> is_gated("carefully : mia has 3 pears .".split()), is_gated(["mia", "has"])
        (True, False)
    """
    return next((word for word in prompt if not word.startswith("<")), None) == GATE


def step_ends(words: Sequence[str]) -> list[StepEnd]:
    """Return the ends of all steps of a response, in order.

    Args:
        words: words of the response, from ``<think>`` on.

    Raises:
        UserError: a sentence with ``=`` is no step, or ``wait`` does not follow a slip.

    A slip without ``wait`` after it is recognised if its equation is false, or if the step names
    the effect of another operation, as in responses of the gated pair without its marker.

    Example:
        >>> step_ends("first gain 3 - 4 = 7 . wait , first gain 3 + 4 = 7 .".split())
        [StepEnd(position=7, slip='operation'), StepEnd(position=17, slip=None)]
        >>> step_ends("first she loses 3 , so 4 + 3 = 7 pears , a loss climbs .".split())
        [StepEnd(position=16, slip='operation')]
    """
    ends: list[StepEnd] = []
    steps: list[_Step] = []
    follows = False  # whether the sentence directly before is a step
    first = 0
    for index in (i for i, word in enumerate(words) if word == _STOP):
        sentence, first = tuple(words[first:index]), index + 1
        corrects = sentence[:2] == _CORRECTION
        aside = any(sentence[: len(start)] == start for start in _ASIDES)
        step = None if aside else _step(sentence[2:] if corrects else sentence)
        if corrects:
            if step is None or not follows:
                raise UserError(f"expected a step before and after 'wait', got {_text(sentence)}")
            ends[-1] = StepEnd(ends[-1].position, _slip(steps[-1], step))
        if step is not None:
            steps.append(step)
            ends.append(StepEnd(index, _contradiction(step)))
        follows = step is not None
    return ends


def _step(sentence: tuple[str, ...]) -> _Step | None:
    """Parse a sentence without its stop; None for a sentence without an equation."""
    words = sentence[2:] if sentence[:2] == _PAUSE else sentence
    if "=" not in words:
        return None
    equals = words.index("=")
    before, after = words[:equals], words[equals + 1 :]
    if before[-1:] == (")",) and len(before) >= 6:  # operator ( left , right )
        operator, opened, left, comma, right, _ = before[-6:]
        lead, well_formed = before[:-6], (opened, comma) == ("(", ",")
    elif len(before) >= 3:
        left, operator, right = before[-3:]
        lead, well_formed = before[:-3], True
    else:
        well_formed = False
    well_formed = well_formed and operator in _OPERATIONS
    if not well_formed or not after or not all(n.isdecimal() for n in (left, right, after[0])):
        raise UserError(f"expected a step such as 'first gain 3 + 4 = 7', got {_text(sentence)}")
    tail, effect = after[1:], ""
    if tail[-4:-2] == (",", "a") and tail[-1] in (*DIRECTIONS, *CONTRARY):
        tail, effect = tail[:-4], tail[-2]
    return _Step(lead, left, operator, right, after[0], tail, effect)


def _contradiction(step: _Step) -> Slip | None:
    """Return where a step contradicts itself: in its result or its operation; None: nowhere."""
    if _OPERATIONS[step.operator](int(step.left), int(step.right)) != int(step.result):
        return "result"
    contradicts = step.effect != "" and EFFECTS.get(step.operator) != step.effect
    return "operation" if contradicts else None


def _slip(wrong: _Step, right: _Step) -> Slip:
    same = right._replace(operator=wrong.operator, result=wrong.result) == wrong
    if not same or wrong == right:
        raise UserError(
            f"expected 'wait' between a wrong step and the same step done right, got "
            f"{_text(wrong)} and {_text(right)}"
        )
    return "result" if wrong.operator == right.operator else "operation"


def _text(words: Iterable[str | tuple[str, ...]]) -> str:
    flat = [w for word in words for w in (word if isinstance(word, tuple) else (word,))]
    return repr(" ".join(flat).strip())[:80]
