"""What a judge is asked, and what it answers: in strings, so that it needs no model of the pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple, Protocol

from fastadapt.reporting.formatting import number

#: Pieces of text, one per token; tokens that share a character are one piece.
Pieces = tuple[str, ...]
Progress = Callable[[int, int], None]  # questions answered, questions


@dataclass(frozen=True)
class Example:
    """A stretch of text and at which of its pieces the unit is active."""

    pieces: Pieces
    fires: tuple[bool, ...]


@dataclass(frozen=True)
class Describe:
    """What do these examples have in common? The answer is a ``str``."""

    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Detect:
    """On which of these texts is the unit of this description active?

    The answer is a tuple of bools, one per text.
    """

    description: str
    texts: tuple[Pieces, ...]


@dataclass(frozen=True)
class Classify:
    """Of which class is the unit? The answer is a :class:`Class`."""

    examples: tuple[Example, ...]
    promoted: Pieces
    suppressed: Pieces


Question = Describe | Detect | Classify

#: Classes, and the subclasses of those that have some.
CLASSES: dict[str, tuple[str, ...]] = {
    "language": (),
    "domain": ("math", "code", "science"),
    "reasoning": ("output", "simple input", "abstract input"),
    "uninterpretable": (),
}


def class_names() -> list[str]:
    """``class`` and ``class: subclass``, as shares of units are listed.

    Example:
        >>> class_names()[:3]
        ['language', 'domain', 'domain: math']
    """
    return [
        name if subclass is None else f"{name}: {subclass}"
        for name, subclasses in CLASSES.items()
        for subclass in (None, *subclasses)
    ]


@dataclass(frozen=True)
class Class:
    """A class, its subclass where it has some, and why, in the judge's words."""

    name: str
    subclass: str | None
    reason: str


Answer = str | tuple[bool, ...] | Class


class Estimate(NamedTuple):
    """What questions will cost.

    Attributes:
        calls: to be made; answers that are kept from before are not among them. An answer that is
            not valid is asked for once more, with it and what is wrong with it in the question,
            which is not counted in any of these.
        kept: answers kept from before.
        tokens_in: of the questions.
        tokens_out: at most, of the answers; None where nothing limits them.
        cost: in the currency of the prices; None where no price was given, or no limit.
        counted: how tokens were counted, in words.
    """

    calls: int
    kept: int
    tokens_in: int
    tokens_out: int | None
    cost: float | None
    counted: str

    @property
    def words(self) -> str:
        """All of it in a line."""
        if self.tokens_out is None:
            answers, cost = "any number of answers", "no limit (judge.max_tokens)"
        else:
            answers = f"at most {self.tokens_out:,} of answers"
            cost = "no prices given" if self.cost is None else f"some {number(self.cost)} in all"
        line = (
            f"{self.calls:,} calls ({self.kept:,} answers kept from before), {self.tokens_in:,} "
            f"tokens of questions ({self.counted}), {answers}: {cost}"
        )
        again = (
            "; up to twice that where answers are not valid (each such is asked for once more), "
            "and the tokens of those answers besides"
        )
        return line + again if self.calls else line


class Judge(Protocol):
    """Whoever answers."""

    @property
    def name(self) -> str:
        """What its answers are signed with."""

    @property
    def about(self) -> dict[str, str | int | None]:
        """What else is to be written down of it: nothing secret."""

    @property
    def tells_classes(self) -> bool:
        """Whether it answers :class:`Classify`."""

    def ask(
        self,
        questions: Sequence[Question],
        *,
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> list[Answer | None]:
        """An answer to each question; None where it was not valid, or where ``stop`` came first.

        Raises:
            RunError: the judge cannot be reached, or too many of its answers are not valid.
        """

    def kept(self, question: Question) -> Answer | None:
        """The answer that asking would give without any work that costs; None if there is none."""

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """What asking would cost."""
