"""Questions to a judge and its answers, as strings, so that a judge does not load the pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple, Protocol

from fastadapt.reporting.formatting import number

#: Pieces of a text, one per token; tokens that share a character form one piece.
Pieces = tuple[str, ...]
Progress = Callable[[int, int], None]  # (completed, total)


@dataclass(frozen=True)
class Example:
    """Excerpt of a text, and whether a feature or neuron is active on each piece of the excerpt."""

    pieces: Pieces
    fires: tuple[bool, ...]


@dataclass(frozen=True)
class DescribeQuestion:
    """Ask what examples have in common. The answer is a ``str``."""

    examples: tuple[Example, ...]


@dataclass(frozen=True)
class DetectQuestion:
    """Ask in which texts a described unit is active. The answer is a bool for each text."""

    description: str
    texts: tuple[Pieces, ...]


@dataclass(frozen=True)
class ClassifyQuestion:
    """Ask for the class of a unit. The answer is a :class:`UnitClass`."""

    examples: tuple[Example, ...]
    promoted: Pieces
    suppressed: Pieces


Question = DescribeQuestion | DetectQuestion | ClassifyQuestion

#: Subclasses by class.
CLASSES: dict[str, tuple[str, ...]] = {
    "language": (),
    "domain": ("math", "code", "science"),
    "reasoning": ("output", "simple input", "abstract input"),
    "uninterpretable": (),
}


def class_names() -> list[str]:
    """Return ``class`` and ``class: subclass`` names in the order of :data:`CLASSES`.

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
class UnitClass:
    """Class, subclass (None if the class has none), and the judge's reason."""

    name: str
    subclass: str | None
    reason: str


Answer = str | tuple[bool, ...] | UnitClass


class Estimate(NamedTuple):
    """Estimated cost of asking questions, if no answer is invalid and asked for again.

    Attributes:
        calls: number of requests, without questions that the cache answers.
        cached: number of questions that the cache answers.
        tokens_in: number of tokens of the requests.
        tokens_out: maximum number of tokens of the answers; None without a limit.
        cost: maximum cost in the currency of the prices; None without prices or without a limit.
        counted: method of counting tokens, in words.
    """

    calls: int
    cached: int
    tokens_in: int
    tokens_out: int | None
    cost: float | None
    counted: str

    @property
    def words(self) -> str:
        """Return the estimated requests, tokens and costs in one line."""
        if self.tokens_out is None:
            answers, cost = "any number of answers", "no limit (judge.max_tokens)"
        else:
            answers = f"at most {self.tokens_out:,} of answers"
            cost = "no prices given" if self.cost is None else f"about {number(self.cost)} in all"
        line = (
            f"{self.calls:,} calls ({self.cached:,} answers cached), {self.tokens_in:,} tokens of "
            f"questions ({self.counted}), {answers}: {cost}"
        )
        second = (
            "; up to twice that if answers are not valid (each is requested once more), plus the "
            "tokens of those answers"
        )
        return line + second if self.calls else line


class Judge(Protocol):
    """Interface of a judge, which answers questions about units (features or neurons)."""

    @property
    def name(self) -> str:
        """Name of the judge in tables and files."""

    @property
    def about(self) -> dict[str, str | int | None]:
        """Facts about the judge for ``judgements.json``, without secrets."""

    @property
    def can_classify(self) -> bool:
        """Whether the judge answers :class:`ClassifyQuestion`."""

    def ask(
        self,
        questions: Sequence[Question],
        *,
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> list[Answer | None]:
        """Answer each question; None where the answer is invalid or ``stop`` was set before.

        Raises:
            RunError: the judge cannot be reached, or too many of its answers are invalid.
        """

    def cached_answer(self, question: Question) -> Answer | None:
        """Return the answer if it needs no paid call, else None."""

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Estimate the cost of asking these questions."""
