"""How many answers of an endpoint came, and how many of them are not valid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastadapt.features.autointerp.questions import Answer

_AT_FIRST = 20  # answers, none of them valid, that are enough to end


@dataclass(frozen=True)
class Told:
    """An answer, None if it was not valid; its last text, and what was asked."""

    answer: Answer | None
    text: str
    requests: list[Mapping[str, Any]]


class Tally:
    """How many answers came, and how many of them are not valid."""

    def __init__(self, total: int, share: float) -> None:
        self.total, self._share = total, share
        self.done = self.invalid = 0
        self.sample = ""
        self.requests: list[Mapping[str, Any]] = []  # of the answers that are not valid

    def add(self, told: Told) -> None:
        """Count one."""
        self.done += 1
        if told.answer is None:
            self.invalid += 1
            self.sample = told.text
            self.requests += told.requests

    @property
    def hopeless(self) -> bool:
        """Whether too many are not valid whatever comes, or all of the first are not."""
        beyond = self.invalid > self._share * self.total
        return beyond or (self.done >= _AT_FIRST and self.invalid == self.done)
